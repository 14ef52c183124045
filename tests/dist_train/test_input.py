"""The order of the examples, and what each replica gets of it."""

import math

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import dist_train
from dist_train.input import Input, Schedule, choose


def order(schedule, epoch, replicas=1):
    """[replicas, steps, b] ids of a whole epoch in one chunk."""
    return np.stack(
        [
            schedule.share(tf.constant(epoch, tf.int64), tf.constant(r, tf.int64), replicas)[
                0
            ].numpy()
            for r in range(replicas)
        ]
    )


def schedule(examples, batch_size, **options):
    values = {
        "seed": 0,
        "shuffle": True,
        "chunk_steps": math.ceil(examples / batch_size),
        **options,
    }
    return Schedule(examples=examples, batch_size=batch_size, **values)


@pytest.mark.parametrize("examples", [1, 2, 10, 1000, 4097])
@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_an_epoch_has_each_example_once(examples, epoch):
    ids = order(schedule(examples, 64), epoch)
    assert sorted(ids[ids >= 0].tolist()) == list(range(examples))


GOLDEN = ([19243, 33170, 37564, 7321, 12566, 26109], [32424, 46535, 22669, 29159, 23289, 30382])


def test_the_order_does_not_change_from_version_to_version():
    ids = order(schedule(50_000, 64), 0)[0, 0, :6].tolist()
    assert ids == GOLDEN[0]
    assert order(schedule(50_000, 64, seed=3), 2)[0, 0, :6].tolist() == GOLDEN[1]


def test_the_orders_of_two_epochs_are_unrelated():
    orders = np.stack([order(schedule(50_000, 50), epoch)[0].reshape(-1) for epoch in range(8)])
    correlation = np.abs(np.corrcoef(orders)[np.triu_indices(8, 1)])
    assert correlation.max() < 0.02  # 1 / sqrt(50,000) = 0.0045 is what chance gives


def test_positions_are_equally_likely():
    # 10 places x 10 examples over 1,000 epochs: chi-square with 81 degrees of freedom; 1e-6 is 150.
    plan, replica = schedule(10, 10), tf.constant(0, tf.int64)
    share = tf.function(lambda epoch: plan.share(epoch, replica, 1)[0])
    orders = np.stack([share(tf.constant(epoch, tf.int64))[0] for epoch in range(1000)])
    counts = np.stack([np.bincount(orders[:, place], minlength=10) for place in range(10)])
    assert ((counts - 100) ** 2 / 100).sum() < 150


@pytest.mark.parametrize("replicas", [2, 3, 4])
@pytest.mark.parametrize(("examples", "batch_size"), [(1000, 64), (1000, 50), (7, 3), (64, 64)])
def test_the_shares_of_replicas_make_up_the_global_batches(replicas, examples, batch_size):
    one = order(schedule(examples, batch_size), 1)[0]
    shares = order(schedule(examples, batch_size), 1, replicas)
    for step, row in enumerate(one):
        together = shares[:, step].reshape(-1)
        assert together[together >= 0].tolist() == row[row >= 0].tolist()


def test_the_order_of_the_file_without_shuffling():
    ids = order(schedule(10, 4, shuffle=False), 3)[0]
    assert ids.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, -1, -1]]


def test_every_step_is_found_in_its_chunk():
    plan = schedule(1000, 64, chunk_steps=5)  # 16 steps an epoch: chunks of 5, 5, 5 and 1
    assert plan.chunks_per_epoch == 4
    assert plan.locate(0) == (0, 0, 5)
    assert plan.locate(7) == (1, 2, 3)
    assert plan.locate(15) == (3, 0, 1)
    assert plan.locate(16) == (4, 0, 5)
    assert [plan.examples_until(step) for step in (0, 1, 15, 16, 17)] == [0, 64, 960, 1000, 1064]


X = np.arange(100, dtype=np.float32)[:, None] * np.ones((1, 3), np.float32)
Y = np.arange(100)


@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize("first", [0, 1])
def test_streamed_examples_are_those_of_the_order(replicas, first):
    strategy = (
        tf.distribute.get_strategy()
        if replicas == 1
        else tf.distribute.MirroredStrategy([f"CPU:{n}" for n in range(replicas)])
    )
    inputs = Input(
        dist_train.Arrays(X, Y), strategy, resident=False, batch_size=8, seed=1, shuffle=True
    )
    chunk = next(inputs.chunks(first))
    local = strategy.experimental_local_results
    for replica in range(replicas):
        ids = local(chunk.ids)[replica].numpy()
        x, y = (local(part)[replica].numpy() for part in chunk.examples)
        expected, _ = inputs.schedule.share(
            tf.constant(first, tf.int64), tf.constant(replica, tf.int64), replicas
        )
        np.testing.assert_array_equal(ids, expected)
        flat = np.maximum(ids.reshape(-1), 0)
        np.testing.assert_array_equal(y, Y[flat])
        np.testing.assert_array_equal(x, X[flat])


def test_auto_is_resident_where_it_fits(tmp_path):
    arrays = dist_train.Arrays(X, Y)
    assert choose("auto", [arrays], 1)[0]
    assert not choose("stream", [arrays], 1)[0]
    mapped = np.memmap(tmp_path / "x", np.float32, "w+", shape=(100, 3))
    assert choose("auto", [dist_train.Arrays(mapped, Y)], 1) == (False, "an array is a file")


def test_resident_needs_arrays():
    class Other:
        def __len__(self):
            return 1

        def __getitem__(self, indices):
            return X[indices], Y[indices]

    assert not choose("auto", [Other()], 1)[0]
    with pytest.raises(dist_train.UsageError, match="use --input=stream"):
        choose("resident", [Other()], 1)


def test_neighbouring_seeds_give_unrelated_orders():
    orders = np.stack(
        [order(schedule(50_000, 50, seed=seed), 0)[0].reshape(-1) for seed in range(8)]
    )
    correlation = np.abs(np.corrcoef(orders)[np.triu_indices(8, 1)])
    assert correlation.max() < 0.02


def test_a_seed_is_not_an_epoch():
    assert (order(schedule(100, 10, seed=1), 0) != order(schedule(100, 10, seed=0), 1)).any()


@pytest.mark.parametrize("replicas", [1, 3])
def test_the_order_does_not_depend_on_the_chunks(replicas):
    whole = order(schedule(1000, 64), 2, replicas)
    plan = schedule(1000, 64, chunk_steps=5)
    parts = [
        order(plan, 2 * plan.chunks_per_epoch + number, replicas)
        for number in range(plan.chunks_per_epoch)
    ]
    together = np.concatenate(parts, axis=1)
    np.testing.assert_array_equal(together[:, : whole.shape[1]], whole)
    assert (together[:, whole.shape[1] :] == -1).all()  # steps beyond the epoch hold no example


@settings(deadline=None, max_examples=200)
@given(
    examples=st.integers(1, 300),
    batch_size=st.integers(1, 70),
    chunk_steps=st.integers(1, 20),
    step=st.integers(0, 1000),
)
def test_any_step_is_where_counting_finds_it(examples, batch_size, chunk_steps, step):
    plan = schedule(examples, batch_size, chunk_steps=chunk_steps)
    sizes = [min(batch_size, examples - at) for at in range(0, examples, batch_size)]
    chunks = [len(sizes[at : at + chunk_steps]) for at in range(0, len(sizes), chunk_steps)]
    places = [
        (number, within, length - within)
        for number, length in enumerate(chunks)
        for within in range(length)
    ]
    epoch, within = divmod(step, len(sizes))
    chunk, start, left = places[within]
    assert plan.locate(step) == (epoch * len(chunks) + chunk, start, left)
    assert plan.examples_until(step) == epoch * examples + sum(sizes[:within])


@settings(deadline=None, max_examples=30)
@given(
    examples=st.integers(1, 60),
    batch_size=st.integers(1, 20),
    replicas=st.integers(1, 5),
    shuffle=st.booleans(),
)
def test_shares_hold_each_example_once_in_the_place_of_one_replica(
    examples, batch_size, replicas, shuffle
):
    plan = schedule(examples, batch_size, shuffle=shuffle)
    shares = order(plan, 3, replicas)
    columns = np.concatenate(list(shares), axis=1)
    np.testing.assert_array_equal(columns[:, :batch_size], order(plan, 3)[0])
    assert (columns[:, batch_size:] == -1).all()


def _strategy(replicas):
    if replicas == 1:
        return tf.distribute.get_strategy()
    return tf.distribute.MirroredStrategy([f"CPU:{n}" for n in range(replicas)])


@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("resident", [True, False])
def test_chunks_from_the_middle_are_those_from_the_beginning(replicas, resident, monkeypatch):
    monkeypatch.setattr("dist_train.input._STREAM_CHUNK_BYTES", 2 * 8 * 20)  # two steps of 8
    monkeypatch.setattr("dist_train.input._RESIDENT_CHUNK_STEPS", 2)
    strategy = _strategy(replicas)
    inputs = Input(
        dist_train.Arrays(X, Y), strategy, resident=resident, batch_size=8, seed=1, shuffle=True
    )
    assert (inputs.schedule.chunk_steps, inputs.schedule.chunks_per_epoch) == (2, 7)
    count = 16  # two epochs and two chunks

    def taken(first):
        chunks = inputs.chunks(first)
        return [
            [
                [part.numpy() for part in strategy.experimental_local_results(value)]
                for value in tf.nest.flatten(next(chunks))
            ]
            for _ in range(first, count)
        ]

    everything = taken(0)
    for first in (1, 7, 9):
        for one, other in zip(taken(first), everything[first:], strict=True):
            tf.nest.map_structure(np.testing.assert_array_equal, one, other)
    epochs = [chunk[1][0].item() for chunk in everything]
    assert epochs == [number // 7 for number in range(count)]


def test_workers_read_the_shares_of_their_own_replicas():
    inputs = Input(
        dist_train.Arrays(X, Y), _strategy(1), resident=False, batch_size=10, seed=1, shuffle=True
    )
    for pipeline in range(3):  # three workers of two replicas each
        context = tf.distribute.InputContext(3, pipeline, 6)
        elements = inputs._dataset(context, 2, []).as_numpy_iterator()
        for chunk in (2, 3):
            for local in range(2):
                ids, epoch, (_, y) = next(elements)
                expected, _ = inputs.schedule.share(
                    tf.constant(chunk, tf.int64), tf.constant(2 * pipeline + local, tf.int64), 6
                )
                np.testing.assert_array_equal(ids, expected)
                np.testing.assert_array_equal(y, Y[np.maximum(ids.reshape(-1), 0)])
                assert epoch == chunk


@pytest.mark.parametrize("replicas", [1, 2])
def test_resident_examples_are_on_each_device(replicas):
    strategy = _strategy(replicas)
    inputs = Input(dist_train.Arrays({"a": X}, Y), strategy, resident=True, batch_size=8)
    x, y = inputs.data
    for array, expected in ((x["a"], X), (y, Y)):
        for copy in strategy.experimental_local_results(array):
            np.testing.assert_array_equal(copy, expected)
    assert next(inputs.chunks(0)).examples == ()


def test_streamed_trees_strings_and_files_are_read(tmp_path):
    mapped = np.memmap(tmp_path / "x", np.float32, "w+", shape=X.shape)
    mapped[:] = X
    names = np.array([f"n{n}" for n in range(100)])
    arrays = dist_train.Arrays({"a": mapped, "b": (names,)}, Y)
    inputs = Input(arrays, _strategy(1), resident=False, batch_size=7, seed=2, shuffle=True)
    chunk = next(inputs.chunks(0))
    rows = np.maximum(chunk.ids.numpy().reshape(-1), 0)
    x, y = chunk.examples
    np.testing.assert_array_equal(x["a"], X[rows])
    assert [name.decode() for name in x["b"][0].numpy()] == names[rows].tolist()
    np.testing.assert_array_equal(y, Y[rows])


@pytest.mark.parametrize("resident", [True, False])
def test_numbers_in_the_byte_order_of_another_machine_are_the_same_numbers(resident):
    arrays = dist_train.Arrays(X.astype(">f4"), Y.astype(">i8"))

    class Random:
        def __len__(self):
            return len(arrays)

        def __getitem__(self, indices):
            return arrays[indices]

    for source in (arrays,) if resident else (arrays, Random()):
        inputs = Input(source, _strategy(1), resident=resident, batch_size=7)
        (x, y), ids = next(inputs.chunks(0)).batch(tf.constant(3), inputs.data)
        np.testing.assert_array_equal(x, X[ids.numpy()])
        np.testing.assert_array_equal(y, Y[ids.numpy()])


def test_more_examples_than_indices_are_refused():
    class Endless:
        def __len__(self):
            return 2**31

        def __getitem__(self, indices):
            return X[indices % 100], Y[indices % 100]

    with pytest.raises(dist_train.UsageError, match="more than 2147483647 are not supported"):
        Input(Endless(), _strategy(1), resident=False, batch_size=8)


def test_what_does_not_fit_on_a_device_is_streamed(monkeypatch):
    arrays = dist_train.Arrays(X, Y)
    monkeypatch.setattr("dist_train.input._RESIDENT_LIMIT_BYTES", arrays.nbytes)
    assert choose("auto", [arrays], 1)[0]
    assert not choose("auto", [arrays, arrays], 1)[0]
    assert choose("resident", [arrays, arrays], 1) == (True, "asked for")


class Given:
    """A source of 8 examples that answers with what a function makes of the indices."""

    def __init__(self, answer):
        self._answer = answer

    def __len__(self):
        return 8

    def __getitem__(self, indices):
        return self._answer(indices)


def scalar(indices):
    return float(indices), 0


def gone(indices):
    if len(indices) > 1:
        raise OSError("the disk is gone")
    return indices, indices


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (lambda i: i, dist_train.UsageError, r"gave a ndarray; it must give \(x, y\)"),
        (scalar, dist_train.UsageError, "Given.__getitem__ failed for an array of 1 indices"),
        (lambda i: (i, 3), dist_train.UsageError, r"an array of shape \[\] for 1 indices"),
        (lambda i: (i, i[: max(1, len(i) - 1)]), dist_train.UsageError, r"shape \[7\] for 8 ind"),
        (gone, OSError, "^the disk is gone$"),
    ],
)
def test_a_source_that_gives_something_else_is_named(answer, error, message):
    with pytest.raises(error, match=message):
        next(
            Input(Given(answer), tf.distribute.get_strategy(), resident=False, batch_size=4).chunks(
                0
            )
        )
