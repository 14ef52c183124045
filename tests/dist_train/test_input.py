"""What each replica gets of the examples, resident and streamed."""

import contextlib
import itertools
import threading
import time

import numpy as np
import pytest
import tensorflow as tf

import dist_train
from dist_train.buffers import Buffers
from dist_train.input import Input, choose
from dist_train.readahead import Readahead

X = np.arange(100, dtype=np.float32)[:, None] * np.ones((1, 3), np.float32)
Y = np.arange(100)


def rows_of(ids):
    """Padding of -1 - i has example i."""
    return np.where(ids >= 0, ids, -1 - ids).reshape(-1)


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
        flat = rows_of(ids)
        np.testing.assert_array_equal(y, Y[flat])
        np.testing.assert_array_equal(x, X[flat])


def test_one_replica_reads_a_source_by_one_thread_at_a_time():
    class Once:
        def __init__(self):
            self.lock = threading.Lock()

        def __len__(self):
            return len(X)

        def __getitem__(self, indices):
            assert self.lock.acquire(blocking=False), "another thread is here"
            time.sleep(0.01)
            self.lock.release()
            return X[indices], Y[indices]

    inputs = Input(Once(), tf.distribute.get_strategy(), resident=False, batch_size=8)
    for _ in zip(range(5), inputs.chunks(0), strict=False):
        pass


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize(("chunk_bytes", "evaluations_that_read"), [(None, 1), (0, 3)])
def test_one_chunk_of_a_stream_is_read_for_the_first_evaluation_only(
    chunk_bytes, evaluations_that_read, replicas, monkeypatch
):
    if chunk_bytes is not None:
        monkeypatch.setattr("dist_train.input._STREAM_CHUNK_BYTES", chunk_bytes)
    strategy = _strategy(replicas)
    inputs = Input(dist_train.Arrays(X, Y), strategy, resident=False, batch_size=64)
    opened, chunks = [], inputs.chunks
    monkeypatch.setattr(inputs, "chunks", lambda *a, **kw: opened.append(1) or chunks(*a, **kw))
    for _ in range(3):
        sums = 0.0
        for chunk, _ in inputs.first_epoch():
            for replica in range(replicas):
                ids, (x, _) = (
                    tf.nest.map_structure(
                        lambda part, r=replica: strategy.experimental_local_results(part)[r], whole
                    )
                    for whole in (chunk.ids, chunk.examples)
                )
                sums += x.numpy()[ids.numpy().reshape(-1) >= 0].sum()
        assert sums == X.sum()
    assert len(opened) == evaluations_that_read


def test_two_threads_read_arrays_and_the_chunks_stay_in_order(monkeypatch):
    strategy = tf.distribute.get_strategy()
    inputs = Input(
        dist_train.Arrays(X, Y), strategy, resident=False, batch_size=8, seed=1, shuffle=True
    )
    zero = tf.constant(0, tf.int64)
    first = rows_of(inputs.schedule.share(zero, zero, 1)[0].numpy())
    both, takes, take = threading.Barrier(2, timeout=30), itertools.count(), Buffers.take

    def meet(self, array, rows):
        if next(takes) < 2:
            both.wait()
        if rows.tolist() == first.tolist():
            time.sleep(0.2)  # the other thread has its chunk long before
        return take(self, array, rows)

    monkeypatch.setattr(Buffers, "take", meet)
    chunks = inputs.chunks(0)
    assert [int(next(chunks).epoch) for _ in range(3)] == [0, 1, 2]


def test_the_kernel_is_told_of_the_rows_of_a_file(tmp_path, monkeypatch):
    mapped = np.memmap(tmp_path / "x", np.float32, "w+", shape=X.shape)
    told = []

    def reading(self, rows):
        told.append(rows.tolist())
        return contextlib.nullcontext()

    monkeypatch.setattr(Readahead, "reading", reading)
    arrays, strategy = dist_train.Arrays(mapped, Y), tf.distribute.get_strategy()
    inputs = Input(arrays, strategy, resident=False, batch_size=8, seed=1, shuffle=True)
    ids = next(inputs.chunks(0)).ids.numpy().reshape(-1)
    assert rows_of(ids).tolist() in told


def test_auto_is_resident_where_it_fits(tmp_path):
    arrays = dist_train.Arrays(X, Y)
    assert choose("auto", [arrays], 1)[0]
    assert not choose("stream", [arrays], 1)[0]
    mapped = np.memmap(tmp_path / "x", np.float32, "w+", shape=(100, 3))
    assert choose("auto", [dist_train.Arrays(mapped, Y)], 1) == (False, "an array is a file")


def test_chunks_are_those_of_a_stream_where_another_worker_streams(monkeypatch):
    monkeypatch.setattr("dist_train.input._STREAM_CHUNK_BYTES", 3 * 8 * 20)

    def steps(**settings):
        inputs = Input(
            dist_train.Arrays(X, Y), tf.distribute.get_strategy(), batch_size=8, **settings
        )
        return inputs.schedule.chunk_steps

    assert steps(resident=True) == 13
    assert steps(resident=True, also_streamed=True) == 3
    assert steps(resident=False) == steps(resident=False, also_streamed=True) == 3


def test_a_source_may_use_tensorflow():
    class Tensors:
        def __len__(self):
            return len(X)

        def __getitem__(self, indices):
            return tf.gather(X, indices), tf.gather(Y, indices)

    inputs = Input(Tensors(), tf.distribute.get_strategy(), resident=False, batch_size=8)
    chunk = next(inputs.chunks(0))
    np.testing.assert_array_equal(chunk.examples[1][:100], Y)


def test_resident_needs_arrays():
    class Other:
        def __len__(self):
            return 1

        def __getitem__(self, indices):
            return X[indices], Y[indices]

    assert not choose("auto", [Other()], 1)[0]
    with pytest.raises(dist_train.UsageError, match="use --input=stream"):
        choose("resident", [Other()], 1)


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
                np.testing.assert_array_equal(y, Y[rows_of(ids)])
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
    rows = rows_of(chunk.ids.numpy())
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


@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("kind", ["resident", "stream", "dataset"])
def test_padding_brings_in_no_example_of_another_batch(kind, replicas):
    """0 times the loss of an example that has inf or NaN in it is NaN."""
    bad = X[:10].copy()
    bad[0] = np.inf
    source = dist_train.Arrays(bad, Y[:10])
    if kind == "dataset":
        source = dist_train.Dataset(
            lambda: tf.data.Dataset.from_tensor_slices((bad, Y[:10])), examples=10
        )
    strategy = _strategy(replicas)
    inputs = Input(source, strategy, resident=kind == "resident", batch_size=4)
    chunk = next(inputs.chunks(0))
    finite = []
    for step in range(3):
        run = strategy.run(
            lambda chunk, data, at=step: chunk.batch(tf.constant(at), data)[0][0],
            args=(chunk, inputs.data),
        )
        parts = strategy.experimental_local_results(run)
        finite.append(all(np.isfinite(part.numpy()).all() for part in parts))
    assert finite == [False, True, True]
