"""A whole run: its workdir, its exports, its resume, its ends."""

import json
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from small_run import X, Y, rows, train

import dist_train
from dist_train.workdir import Workdir


def assert_equal_weights(one, other):
    for a, b in zip(one.model.get_weights(), other.model.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)


def test_a_finished_run_tells_its_metrics_again(workdir):
    first, again = train(workdir), train(workdir)
    assert again.metrics.keys() == {"validation", "test"}
    for kind, values in again.metrics.items():
        assert values == pytest.approx(first.metrics[kind])


def test_the_workdir_holds_what_it_promises(workdir):
    result = train(workdir)
    folder = Path(workdir)
    config = json.loads((folder / "config.json").read_text())
    assert config["config"]["batch_size"] == 16
    assert config["versions"]["tensorflow"] == tf.__version__
    assert [row["step"] for row in rows(workdir, "train")] == [2, 4, 6, 8, 10]
    assert [row["epoch"] for row in rows(workdir, "validation")] == [1, 2]
    (test,) = rows(workdir, "test")
    assert test["accuracy"] == result.metrics["test"]["accuracy"]
    assert {"kind", "step", "epoch", "examples", "loss", "accuracy", "time"} <= set(test)
    assert "examples_per_second" in rows(workdir, "train")[0]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "best-00000010",
        "step-00000005",
        "step-00000010",
    ]
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    events = list((folder / "tensorboard").glob("events*"))
    tags = {
        value.tag
        for file in events
        for event in tf.compat.v1.train.summary_iterator(str(file))
        for value in event.summary.value
    }
    assert {"train/loss", "validation/accuracy", "test/loss"} <= tags


@pytest.mark.parametrize(
    "settings", [{}, {"strategy": "mirrored", "devices": 2}], ids=["default", "mirrored"]
)
def test_the_exports_predict_without_this_package(workdir, settings):
    result = train(workdir, **settings)
    expected = result.model(X).numpy()
    loaded = keras.saving.load_model(Path(workdir) / "model.keras")
    np.testing.assert_allclose(loaded(X), expected, rtol=1e-5, atol=1e-6)
    served = tf.saved_model.load(str(Path(workdir) / "saved_model"))
    np.testing.assert_allclose(served.serve(X), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optimizer": "adam", "learning_rate": 0.01},
        {"lr_schedule": "cosine", "warmup_steps": 3, "epochs": 4},
        {"ema": 0.9},
        {"optimizer": "adamw", "weight_decay": 0.1, "gradient_accumulation": 2},
    ],
    ids=lambda settings: "-".join(settings) or "plain",
)
def test_a_run_in_two_parts_equals_a_run_in_one(tmp_path, stops_at, settings):
    settings = {"checkpoint_steps": 3, "epochs": 4, **settings}
    whole = train(tmp_path / "whole", **settings)
    parts = tmp_path / "parts"
    # Stopped from within, in the midst of an epoch and of an interval of the log.
    changes = {"preprocess": stops_at(7 * settings.get("gradient_accumulation", 1))}
    with pytest.raises(dist_train.Stopped, match="after step 7,"):
        train(parts, changes, steps_per_loop=1, jit_compile="false", **settings)
    resumed = train(parts, **settings)

    assert_equal_weights(whole, resumed)
    one, other = (
        [(row["step"], row["loss"], row["batch_loss"]) for row in rows(folder, "train")]
        for folder in (tmp_path / "whole", parts)
    )
    np.testing.assert_allclose(one, other, rtol=1e-5)
    assert len(rows(parts, "test")) == 1


def test_a_finished_run_started_again_only_evaluates(workdir):
    first = train(workdir)
    again = train(workdir)
    assert again.step == first.step == 10
    assert again.metrics["test"] == pytest.approx(first.metrics["test"])
    assert len(rows(workdir, "train")) == 5
    assert len(rows(workdir, "test")) == 1


def test_more_epochs_go_on_from_the_end(tmp_path):
    train(tmp_path / "a", epochs=1)
    longer = train(tmp_path / "a", epochs=3)
    assert_equal_weights(longer, train(tmp_path / "b", epochs=3))


def test_a_resume_with_another_trajectory_is_refused(workdir):
    train(workdir)
    with pytest.raises(dist_train.UsageError, match=r"batch_size=20 \(was 16\)"):
        train(workdir, batch_size=20)


def test_evaluate_reads_the_newest_checkpoint(workdir):
    trained = train(workdir)
    evaluated = train(workdir, mode="evaluate")
    assert evaluated.step == 10
    assert evaluated.metrics["test"] == pytest.approx(trained.metrics["test"])
    assert evaluated.metrics["validation"] == pytest.approx(trained.metrics["validation"])


def test_evaluate_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(dist_train.UsageError, match="does not exist"):
        train(tmp_path / "none", mode="evaluate")
    (tmp_path / "empty").mkdir()
    with pytest.raises(dist_train.UsageError, match="no checkpoint"):
        train(tmp_path / "empty", mode="evaluate")


@pytest.mark.parametrize("suffix", [".keras", ".weights.h5"])
def test_initial_weights_are_where_training_starts(tmp_path, suffix):
    first = train(tmp_path / "first")
    path = str(tmp_path / f"start{suffix}")
    first.model.save(path) if suffix == ".keras" else first.model.save_weights(path)
    result = train(tmp_path / "second", initial_weights=path, epochs=0)
    assert_equal_weights(first, result)


def test_initial_weights_that_do_not_fit_are_refused(tmp_path):
    path = str(tmp_path / "missing.keras")
    with pytest.raises(dist_train.UsageError, match=r"missing\.keras"):
        train(tmp_path / "run", initial_weights=path)


@pytest.mark.parametrize(
    "settings", [{}, {"strategy": "mirrored", "devices": 2}], ids=["default", "mirrored"]
)
def test_a_loss_that_is_nan_stops_the_run_and_keeps_the_last_good_checkpoint(workdir, settings):
    def loss(y, outputs):
        each = keras.ops.sum(outputs**2, axis=-1)
        # Example 64 to 79 are the fifth batch of an epoch in the order of the file.
        return tf.where(y == 2, np.nan, each)

    y = Y[:80].copy()
    y[70] = 2
    changes = {"loss": loss, "metrics": {}, "train": dist_train.Arrays(X[:80], y)}
    with pytest.raises(dist_train.RunError, match="the loss of step 5 is nan"):
        train(workdir, changes, shuffle=False, checkpoint_steps=2, **settings)
    assert sorted(path.name for path in (Path(workdir) / "checkpoints").iterdir()) == [
        "step-00000002",
        "step-00000004",
    ]


def test_a_damaged_checkpoint_is_skipped_for_the_one_before(tmp_path):
    whole = train(tmp_path / "whole", epochs=3)
    train(tmp_path / "run", epochs=2)
    (data,) = (tmp_path / "run" / "checkpoints" / "step-00000010").glob("state.data*")
    raw = bytearray(data.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    data.write_bytes(raw)
    resumed = train(tmp_path / "run", epochs=3)
    assert_equal_weights(whole, resumed)


def test_augmentation_depends_on_example_and_epoch_alone(tmp_path):
    def noisy(x, y, seed):
        if seed is not None:
            noise = tf.map_fn(
                lambda each: tf.random.stateless_normal([6], each),
                seed,
                fn_output_signature=tf.float32,
            )
            x = x + noise
        return x, y

    one = train(tmp_path / "one", {"preprocess": noisy})
    three = train(tmp_path / "three", {"preprocess": noisy}, strategy="mirrored", devices=3)
    for a, b in zip(one.model.get_weights(), three.model.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_dicts_and_several_outputs_train(workdir):
    def two_inputs():
        a, b = keras.Input((3,), name="a"), keras.Input((3,), name="b")
        hidden = keras.layers.Concatenate()([a, b])
        return keras.Model(
            {"a": a, "b": b},
            {"sum": keras.layers.Dense(1)(hidden), "product": keras.layers.Dense(1)(hidden)},
        )

    x = {"a": X[:, :3], "b": X[:, 3:]}
    y = {"sum": X.sum(axis=1), "product": X.prod(axis=1)}

    def loss(y, outputs):
        return sum(tf.square(outputs[name][:, 0] - y[name]) for name in ("sum", "product"))

    changes = {
        "model": two_inputs, "train": dist_train.Arrays(x, y), "loss": loss, "metrics": {},
        "validation": None, "test": None,
    }  # fmt: skip
    result = train(workdir, changes, epochs=5)
    losses = [row["loss"] for row in rows(workdir, "train")]
    assert losses[-1] < losses[0]
    assert "test" not in result.metrics


def test_a_random_access_source_streams(tmp_path):
    class Squares:
        def __len__(self):
            return 80

        def __getitem__(self, indices):
            return X[indices], Y[indices]

    one = train(tmp_path / "arrays")
    other = train(tmp_path / "source", {"train": Squares()})
    assert_equal_weights(one, other)


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_learns(workdir, dtype):
    train(workdir, epochs=10, dtype=dtype)
    losses = [row["loss"] for row in rows(workdir, "train")]
    assert losses[-1] < 0.8 * losses[0]
    assert keras.config.dtype_policy().name == "float32"


def test_two_runs_on_one_workdir_are_refused(workdir):
    with (
        Workdir.locked(workdir),
        pytest.raises(dist_train.UsageError, match="in use by another run"),
    ):
        train(workdir)
