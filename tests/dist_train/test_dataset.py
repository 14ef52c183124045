"""A tf.data.Dataset as the source: one order, one trajectory, and what it cannot do."""

import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf
from equivalence import EXAMPLES, STRATEGIES, X, Y, assert_same, run, runs_alike

import dist_train
from dist_train import examples, input


def ordered(epoch):
    """Another order in each epoch, by the user's own code."""
    order = np.random.default_rng(epoch).permutation(EXAMPLES)
    return tf.data.Dataset.from_tensor_slices((X[order], Y[order]))


def held_out():
    return tf.data.Dataset.from_tensor_slices((X[EXAMPLES:], Y[EXAMPLES:]))


def model():
    return keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(2)]
    )


def task(make=ordered, count=EXAMPLES, **changes):
    fields = {
        "model": model,
        "train": dist_train.Dataset(make, examples=count),
        "validation": dist_train.Dataset(held_out, examples=len(X) - EXAMPLES),
        "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        "metrics": {"accuracy": keras.metrics.sparse_categorical_accuracy},
    }
    return dist_train.Task(**(fields | changes))


@pytest.fixture
def short_chunks(monkeypatch):
    """Two steps a chunk: an epoch of six steps takes three."""
    monkeypatch.setattr(input, "_STREAM_CHUNK_BYTES", 2 * 15 * (6 * 4 + 4))


@pytest.mark.slow
def test_a_dataset_gives_the_same_numbers_on_every_strategy_and_after_a_resume(
    tmp_path, short_chunks
):
    settings = {"epochs": 3, "checkpoint_steps": 3, "keep_checkpoints": 9}
    whole = runs_alike(tmp_path, task(), **settings)
    # From the midst of an epoch and of a chunk, and on another number of replicas.
    for path in (tmp_path / "mirrored-3" / "checkpoints").iterdir():
        if path.name not in ("step-00000003", "step-00000006", "step-00000009"):
            shutil.rmtree(path)
    resumed = run(tmp_path / "mirrored-3", task(), **settings, **STRATEGIES["mirrored-2"])
    assert_same(whole, resumed)


def test_a_dataset_trains_as_arrays_in_its_order_do(tmp_path):
    arrays = dist_train.Arrays(X[:EXAMPLES], Y[:EXAMPLES])
    evaluated = dist_train.Arrays(X[EXAMPLES:], Y[EXAMPLES:])
    one = run(tmp_path / "arrays", task(train=arrays, validation=evaluated), shuffle=False)

    def plain():
        return tf.data.Dataset.from_tensor_slices((X[:EXAMPLES], Y[:EXAMPLES]))

    assert_same(one, run(tmp_path / "dataset", task(plain)))


def chunks(source, replicas=1, first=0, count=4, batch_size=4):
    strategy = tf.distribute.get_strategy()
    if replicas > 1:
        strategy = tf.distribute.MirroredStrategy([f"CPU:{n}" for n in range(replicas)])
    made = input.Input(source, strategy, resident=False, batch_size=batch_size, shuffle=True)
    local = strategy.experimental_local_results
    return [
        [tf.nest.map_structure(np.asarray, c) for c in local(chunk)]
        for _, chunk in zip(range(count), made.chunks(first), strict=False)
    ]


@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize("first", [0, 2, 4])
def test_chunks_hold_what_the_dataset_gave_in_its_order(replicas, first, monkeypatch):
    monkeypatch.setattr(input, "_STREAM_CHUNK_BYTES", 2 * 4 * (8 + 8))  # two steps of four
    asked = []

    def make(epoch):
        asked.append(epoch)
        numbers = tf.range(11, dtype=tf.int64) + 100 * epoch
        return tf.data.Dataset.from_tensor_slices(({"number": numbers}, -numbers))

    source = dist_train.Dataset(make, examples=11)
    seen = []
    for copies in chunks(source, replicas, first):
        for step in range(2):
            for chunk in copies:
                width = chunk.ids.shape[1]
                real = chunk.ids[step] >= 0
                x, y = tf.nest.map_structure(
                    lambda a, w=width, s=step: a[s * w : (s + 1) * w], chunk.examples
                )
                np.testing.assert_array_equal(x["number"], -y)
                seen.extend(x["number"][real].tolist())
    begin = first // 2 * 100
    expected = [begin + n for n in range(first % 2 * 8, 11)]
    expected += [begin + 100 + n for n in range(11)]
    assert seen[: len(expected)] == expected
    assert first // 2 in asked


def test_workers_cut_out_the_shares_of_their_own_replicas():
    numbers = np.arange(11)
    source = dist_train.Dataset(
        lambda: tf.data.Dataset.from_tensor_slices((numbers, numbers)), examples=11
    )
    strategy = tf.distribute.get_strategy()
    inputs = input.Input(source, strategy, resident=False, batch_size=4)
    seen = []
    for pipeline in range(3):  # three workers of two replicas each
        context = tf.distribute.InputContext(3, pipeline, 6)
        elements = inputs._sequential(source, context, 1, False, []).as_numpy_iterator()
        for local in range(2):
            ids, epoch, (_, y) = next(elements)
            expected, _ = inputs.schedule.share(
                tf.constant(1, tf.int64), tf.constant(2 * pipeline + local, tf.int64), 6
            )
            np.testing.assert_array_equal(ids, expected)
            real = ids.reshape(-1) >= 0
            np.testing.assert_array_equal(y[real], ids.reshape(-1)[real])
            seen.extend(y[real].tolist())
            assert epoch == 1
    assert sorted(seen) == numbers.tolist()


def test_strings_travel_too():
    words = tf.constant(["a", "bcd", "ef"])
    source = dist_train.Dataset(
        lambda: tf.data.Dataset.from_tensor_slices((words, [1, 2, 3])), examples=3
    )
    ((chunk,),) = chunks(source, count=1, batch_size=3)
    assert chunk.examples[0].tolist() == [b"a", b"bcd", b"ef"]


@pytest.mark.parametrize("strategy", ["default", "mirrored-2"])
@pytest.mark.parametrize(("count", "word"), [(79, "more"), (81, "only 80"), (75, "more")])
def test_another_number_of_examples_than_announced_is_an_error(tmp_path, strategy, count, word):
    message = rf"^a Dataset of examples={count} gave {word} in epoch 0"
    with pytest.raises(dist_train.RunError, match=message):
        run(tmp_path, task(count=count), **STRATEGIES[strategy])


def test_a_validation_of_another_number_is_an_error_too(tmp_path):
    short = dist_train.Dataset(held_out, examples=15)  # one whole batch
    with pytest.raises(dist_train.RunError, match="examples=15 gave more"):
        run(tmp_path, task(validation=short))


def test_what_its_function_raises_is_what_the_run_raises(tmp_path):
    def make(epoch):
        if epoch == 1:
            raise FileNotFoundError("part-1.tfrecord")
        return ordered(epoch)

    with pytest.raises(FileNotFoundError, match=r"part-1\.tfrecord"):
        run(tmp_path, task(make))


def test_no_dataset_is_resident(tmp_path):
    with pytest.raises(dist_train.UsageError, match=r"input=resident needs dist_train\.Arrays"):
        run(tmp_path, task(), input="resident")


@pytest.mark.parametrize(
    "make", [lambda: X, lambda: tf.data.Dataset.range(3), lambda epoch: None], ids=range(3)
)
def test_a_function_that_gives_no_examples_is_explained(tmp_path, make):
    with pytest.raises(dist_train.UsageError, match=r"must give a tf\.data\.Dataset of \(x, y\)"):
        run(tmp_path, task(make))


def test_no_examples_are_refused():
    with pytest.raises(dist_train.UsageError, match="examples=0 of a Dataset"):
        dist_train.Dataset(ordered, examples=0)


def test_a_digest_reads_the_beginning_of_the_first_epoch():
    one = dist_train.Dataset(ordered, examples=EXAMPLES)
    same = dist_train.Dataset(lambda: ordered(0), examples=EXAMPLES)
    other = dist_train.Dataset(lambda: ordered(1), examples=EXAMPLES)
    assert examples.digest(one) == examples.digest(same) != examples.digest(other)
