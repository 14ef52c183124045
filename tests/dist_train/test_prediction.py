"""What a trained model says of files."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import dist_train
from dist_train import prediction
from dist_train.mnist import files, mlp
from dist_train.program import Program

RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (5, 28, 28), np.uint8)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(workdir, result) of a small run of the digits."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    return str(folder), dist_train.train(digits, settings(folder, mode="train"))


def digits():
    (x, y), _ = files.read(None)
    return dist_train.Task(
        model=mlp,
        train=dist_train.Arrays(x[:200], y[:200]),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        preprocess=lambda x, y, seed: (tf.cast(x, tf.float32) / 255.0, y),
    )


def settings(workdir, **changes):
    values = {"epochs": 2, "learning_rate": 0.1, "ema": 0.5, "mode": "predict"}
    return dist_train.Config(workdir=str(workdir), **(values | changes))


def chances(trained):
    """Of the exported model, which has the averaged weights, without this package's code."""
    model = keras.saving.load_model(Path(trained[0]) / "model.keras")
    return keras.ops.softmax(model(PICTURES.astype(np.float32) / 255.0)).numpy()


def predict(trained, *paths, task=digits, **changes):
    workdir, _ = trained
    spec = ",".join(map(str, paths))
    return dist_train.train(task, settings(workdir, predict_on=spec, **changes))


def test_images_and_arrays_give_a_line_an_example_in_order(trained, tmp_path, capfd):
    for number in (0, 1):
        data = tf.io.encode_png(PICTURES[number][:, :, None])
        tf.io.write_file(str(tmp_path / f"{number}.png"), data)
    colours = tf.io.encode_png(np.repeat(PICTURES[2][:, :, None], 3, axis=2))
    tf.io.write_file(str(tmp_path / "colour.png"), colours)
    np.save(tmp_path / "one.npy", PICTURES[3])
    np.savez(tmp_path / "many.npz", x=PICTURES.astype(np.int64), y=np.zeros(5))
    names = ["?.png", "colour.png", "one.npy", "many.npz"]
    predict(trained, *(tmp_path / name for name in names), batch_size=64)
    rows = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    seen = [0, 1, 2, 3, 0, 1, 2, 3, 4]
    found = ["0.png", "1.png", "colour.png", "one.npy", *["many.npz"] * 5]
    assert [row["file"] for row in rows] == [str(tmp_path / name) for name in found]
    assert [row["index"] for row in rows] == [0, 0, 0, 0, 0, 1, 2, 3, 4]
    expected = chances(trained)
    for row, number in zip(rows, seen, strict=True):
        np.testing.assert_allclose(row["probabilities"], expected[number], rtol=1e-4, atol=1e-6)
        assert row["label"] == expected[number].argmax()
        assert row["probability"] == row["probabilities"][row["label"]]


def test_a_jpeg_is_read_too(trained, tmp_path, capfd):
    smooth = np.tile(np.arange(28, dtype=np.uint8) * 9, (28, 1))
    tf.io.write_file(str(tmp_path / "a.JPG"), tf.io.encode_jpeg(smooth[:, :, None], quality=100))
    np.save(tmp_path / "a.npy", smooth)
    predict(trained, tmp_path / "a.JPG", tmp_path / "a.npy")
    jpeg, exact = (json.loads(line) for line in capfd.readouterr().out.splitlines())
    np.testing.assert_allclose(jpeg["probabilities"], exact["probabilities"], atol=0.02)


def test_a_table_has_a_column_for_each_class(trained, tmp_path, capfd):
    np.save(tmp_path / "x.npy", PICTURES)
    output = tmp_path / "out.csv"
    predict(trained, tmp_path / "x.npy", output=str(output), checkpoint="4")
    assert capfd.readouterr().out == ""
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "file", "index", "label", "probability", *(f"probabilities_{c}" for c in range(10))
    ]  # fmt: skip
    assert len(rows) == 5
    assert rows[3]["index"] == "3"
    assert not list(tmp_path.glob("*.partial"))


def test_an_old_checkpoint_says_something_else(trained, tmp_path):
    np.save(tmp_path / "x.npy", PICTURES)
    said = {}
    for name in (None, "4"):
        output = tmp_path / f"{name}.jsonl"
        predict(trained, tmp_path / "x.npy", output=str(output), checkpoint=name)
        said[name] = output.read_text()
    assert said[None] != said["4"]


def saved(path, *arrays, **named):
    (np.savez if path.suffix == ".npz" else np.save)(path, *arrays, **named)


def odd(folder):
    """Files that do not fit, and what is said of them."""
    (folder / "text.png").write_text("no image")
    (folder / "text.npy").write_text("no array")
    (folder / "text.npz").write_text("no archive")
    (folder / "notes.txt").write_text("")
    small = tf.io.encode_png(np.zeros((14, 14, 1), np.uint8))
    tf.io.write_file(str(folder / "small.png"), small)
    saved(folder / "wide.npy", np.zeros((3, 28, 29), np.uint8))
    saved(folder / "number.npy", np.float32(1))
    saved(folder / "real.npy", np.zeros((3, 28, 28)))
    saved(folder / "large.npy", np.full((3, 28, 28), 256))
    saved(folder / "object.npy", np.array([{}]))
    saved(folder / "several.npz", a=PICTURES, b=PICTURES)
    return {
        "text.png": "cannot be read as an image",
        "text.npy": "cannot be read",
        "text.npz": "cannot be read",
        "notes.txt": "none of .png, .jpg, .jpeg, .npy, .npz; convert it",
        "none.npy": "is no file",
        "no*.png": "matches no file",
        "small.png": "is 14 x 14; the task's inputs are 28 x 28",
        "wide.npy": "is 3 x 28 x 29; the task's inputs are 28 x 28",
        "number.npy": "is a single number",
        "real.npy": "is float64; the task's inputs are uint8: convert it",
        "large.npy": "is int64; the task's inputs are uint8: convert it",
        "object.npy": "cannot be read",
        "several.npz": "holds a, b; name the one to predict on 'x'",
    }


def test_what_does_not_fit_is_one_line_that_names_the_file(tmp_path):
    _, program, source = parts(digits())
    predictor = prediction.Predictor(source, program, batch_size=2)
    for name, message in odd(tmp_path).items():
        with pytest.raises(dist_train.UsageError) as caught:
            list(predictor.rows(prediction.expand(str(tmp_path / name))))
        assert message in str(caught.value)
        assert name in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1


def parts(task):
    model = task.model()
    program = Program(
        model=model, loss=lambda y, outputs: y, metrics={}, preprocess=task.preprocess
    )
    return model, program, task.train


def test_outputs_that_are_no_classes_are_given_as_they_are(tmp_path):
    a, b = keras.Input((3,), name="a"), keras.Input((), name="b")
    doubled = keras.layers.Lambda(lambda x: 2 * x)
    model = keras.Model({"a": a, "b": b}, {"twice": doubled(a), "same": b})
    x = {"a": RNG.normal(size=(7, 3)).astype(np.float32), "b": np.arange(7, dtype=np.float32)}
    program = Program(model=model, loss=lambda y, outputs: y, metrics={})
    source = dist_train.Arrays(x, np.zeros(7, np.float32))
    predictor = prediction.Predictor(source, program, batch_size=3)
    saved(tmp_path / "x.npz", **x)
    rows = list(predictor.rows([str(tmp_path / "x.npz")]))
    np.testing.assert_allclose([row["outputs"]["twice"] for row in rows], 2 * x["a"], rtol=1e-6)
    assert [row["outputs"]["same"] for row in rows] == list(x["b"])
    prediction.write(rows, str(tmp_path / "out.csv"))
    head = (tmp_path / "out.csv").read_text().splitlines()[0]
    assert head == "file,index,outputs_twice_0,outputs_twice_1,outputs_twice_2,outputs_same"
    saved(tmp_path / "part.npz", a=x["a"])
    with pytest.raises(dist_train.UsageError, match="has no array b; it must hold a, b"):
        list(predictor.rows([str(tmp_path / "part.npz")]))


def test_a_number_that_is_not_finite_is_null(tmp_path, capfd):
    rows = [{"outputs": prediction._plain(np.array([1.0, np.nan, np.inf]))}]
    prediction.write(rows, None)
    assert json.loads(capfd.readouterr().out) == {"outputs": [1.0, None, None]}


@pytest.mark.parametrize(
    ("scale", "shift", "divisor"), [(1.0, 0.0, 255.0), (255.0, 0.0, 1.0), (2.0, -1.0, None)]
)
def test_an_image_gets_the_range_of_the_training_examples(tmp_path, scale, shift, divisor):
    x = (RNG.random((20, 28, 28, 1)) * scale + shift).astype(np.float32)
    inputs = keras.Input((28, 28, 1))
    model = keras.Model(inputs, keras.layers.Lambda(lambda x: x[:, 0, :, 0])(inputs))
    program = Program(model=model, loss=lambda y, outputs: y, metrics={})
    predictor = prediction.Predictor(
        dist_train.Arrays(x, np.zeros(20, np.float32)), program, batch_size=1
    )
    path = str(tmp_path / "a.png")
    tf.io.write_file(path, tf.io.encode_png(PICTURES[0][:, :, None]))
    if divisor is None:
        with pytest.raises(dist_train.UsageError, match=r"from -\S+ to \S+, so it is not known"):
            list(predictor.rows([path]))
        return
    (row,) = predictor.rows([path])
    np.testing.assert_allclose(row["outputs"], PICTURES[0][0] / divisor, rtol=1e-6)


def test_a_run_that_goes_on_can_be_asked(trained, tmp_path, capfd):
    np.save(tmp_path / "x.npy", PICTURES[:1])
    from dist_train.workdir import Workdir

    with Workdir.locked(trained[0]):
        predict(trained, tmp_path / "x.npy")
    assert len(capfd.readouterr().out.splitlines()) == 1


def test_there_must_be_a_run_and_a_checkpoint(tmp_path):
    np.save(tmp_path / "x.npy", PICTURES)
    with pytest.raises(dist_train.UsageError, match="does not exist"):
        predict((tmp_path / "none", None), tmp_path / "x.npy")
    (tmp_path / "empty").mkdir()
    with pytest.raises(dist_train.UsageError, match="no checkpoint to predict"):
        predict((tmp_path / "empty", None), tmp_path / "x.npy")


def test_half_precision_is_written_in_numbers(tmp_path):
    inputs = keras.Input((2,))
    model = keras.Model(inputs, keras.layers.Activation("linear", dtype="bfloat16")(inputs))
    program = Program(model=model, loss=lambda y, outputs: y, metrics={})
    x = np.array([[0.5, -2.0]], np.float32)
    source = dist_train.Arrays(x, np.zeros(1, np.float32))
    np.save(tmp_path / "x.npy", x)
    predictor = prediction.Predictor(source, program, batch_size=1)
    output = tmp_path / "out.jsonl"
    prediction.write(predictor.rows([str(tmp_path / "x.npy")]), str(output))
    assert json.loads(output.read_text())["outputs"] == [0.5, -2.0]


def test_a_reader_who_leaves_ends_it_with_one_line():
    code = (
        "from dist_train import prediction, RunError\n"
        "try:\n"
        "    prediction.write(({'index': n} for n in range(100000)), None)\n"
        "except RunError as error:\n"
        "    raise SystemExit(str(error))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert json.loads(process.stdout.readline()) == {"index": 0}
        process.stdout.close()
        last = process.stderr.read().splitlines()[-1]
    assert last == "standard output was closed before the last prediction"


def test_an_output_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(dist_train.RunError, match=r"output=.*cannot be written"):
        prediction.write([{"a": 1}], str(tmp_path / "none" / "out.csv"))


def said(source, model, path, preprocess=None, batch_size=2):
    program = Program(
        model=model, loss=lambda y, outputs: outputs[:, 0], metrics={}, preprocess=preprocess
    )
    predictor = prediction.Predictor(source, program, batch_size=batch_size)
    return [row["outputs"] for row in predictor.rows([str(path)])]


def test_a_text_longer_than_those_of_the_training_is_whole(tmp_path):
    class Length(keras.layers.Layer):
        def call(self, texts):
            return tf.cast(tf.strings.length(texts), tf.float32)[:, None]

    inputs = keras.Input((), dtype="string")
    np.save(tmp_path / "texts.npy", np.array(["abcdefghij", "ab"]))
    source = dist_train.Arrays(np.array(["abc", "de"]), np.zeros(2, np.float32))
    found = said(source, keras.Model(inputs, Length()(inputs)), tmp_path / "texts.npy")
    assert found == [[10.0], [2.0]]


def test_inputs_go_the_way_of_the_training(tmp_path):
    """Double precision, and tensors and lists of a source of one's own."""

    class Source:
        def __len__(self):
            return 4

        def __getitem__(self, indices):
            x = tf.constant(np.ones((len(indices), 3)))
            return [x, x], tf.zeros(len(indices))

    first, second = keras.Input((3,)), keras.Input((3,))
    model = keras.Model([first, second], keras.layers.Subtract()([first, second]))
    one = tf.constant(1.0)
    np.savez(tmp_path / "two.npz", np.full((2, 3), 5.0), np.full((2, 3), 3.0))
    found = said(Source(), model, tmp_path / "two.npz", lambda x, y, seed: ([x[0] - one, x[1]], y))
    assert found == [[1.0] * 3] * 2
