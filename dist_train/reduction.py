"""Reduction: the sums of a step's tensors over the replicas."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

# A hop costs a worker as much as about so many bytes: 0.2 to 0.4 ms on one core, beside 1 to 2 ns a
# byte and 8 with a network of 1 Gbit/s; more of them where the network is faster or far.
_HOP_BYTES = 50_000
# Gathered by all workers together; of more than this it shows that all is added at the end.
_GATHERED_BYTES = 1 << 20
# TensorFlow numbers its strategies' groups and collectives from small numbers on. Vectors of
# different lengths are different collectives.
_GATHERED, _ROWS, _COLUMNS = 1 << 28, 2 << 28, 3 << 28
_INSTANCE_KEY = 1 << 30

Reduce = Callable[[Sequence[tf.Tensor]], list[tf.Tensor]]
ReduceVector = Callable[[tf.Tensor], tf.Tensor]


def make(strategy: tf.distribute.Strategy, shapes: Sequence[Sequence[int]]) -> Reduce:
    """fn(tensors) -> their sums over the replicas, the same bits on each; for replica context.

    They are laid end to end in one vector, which is reduced at once. CPU devices of one process
    have the same memory, and what is not sent needs no vector: there the tensors are added as they
    are, which takes a quarter off a small step on two devices.

    Args:
      strategy: whose replicas they are.
      shapes: of the tensors, all float32.
    """
    if isinstance(strategy, tf.distribute.MirroredStrategy) and all(
        map(_is_cpu, strategy.extended.worker_devices)
    ):
        return _added
    sizes = [int(np.prod(shape)) for shape in shapes]
    reduce = of_vectors(strategy, sum(sizes))

    def total(tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        vector = reduce(tf.concat([tf.reshape(tensor, [-1]) for tensor in tensors], 0))
        parts = tf.split(vector, sizes)
        return [tf.reshape(part, shape) for part, shape in zip(parts, shapes, strict=True)]

    return total


def of_vectors(strategy: tf.distribute.Strategy, size: int) -> ReduceVector:
    """fn([size] float32) -> [size] float32, as `make`.

    Between N workers of one CPU each there are three ways:

    - a ring that adds, TensorFlow's own: 2 (N - 1) hops, each of an N-th of the vector;
    - a ring that gathers, for short vectors: N - 1 hops of a whole vector, and every worker adds
      all of them in the same order. Of 55,000 floats the sum takes a quarter less time between two
      workers, of 1,000 two fifths;
    - two rings that add, for many workers: the N are a grid, and first each row adds, then each
      column. Of 1,000 workers these are 126 hops and not 1,998, and twice the bytes.

    All else is left to the strategy, which knows the devices.
    """
    replicas = strategy.num_replicas_in_sync
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy) or not (
        len(devices := strategy.extended.worker_devices) == 1 and _is_cpu(devices[0])
    ):
        return _reduced
    rows, columns = grid(replicas)
    is_short = replicas * 4 * size <= _GATHERED_BYTES
    if is_short and replicas - 1 <= _hops(rows) + _hops(columns):
        return _gathered(replicas, size)
    if _ring(rows, size) + _ring(columns, size) < _ring(replicas, size):
        return in_two_rings(strategy.cluster_resolver.task_id, rows, columns, size)
    return _reduced


def grid(workers: int) -> tuple[int, int]:
    """(rows, columns) of the most nearly square grid of so many workers; rows <= columns."""
    rows = next(n for n in range(math.isqrt(workers), 0, -1) if workers % n == 0)
    return rows, workers // rows


def _hops(members: int) -> int:
    """Of a ring that adds."""
    return 2 * (members - 1)


def _ring(members: int, size: int) -> float:
    """What a ring that adds costs, in bytes."""
    return _hops(members) * (_HOP_BYTES + 4 * size / members)


def _is_cpu(device: str) -> bool:
    return tf.DeviceSpec.from_string(device).device_type == "CPU"


def _added(tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    def add(strategy: tf.distribute.Strategy, each: list) -> list[tf.Tensor]:
        with tf.device(strategy.extended.worker_devices[0]):
            return [tf.add_n(strategy.experimental_local_results(values)) for values in each]

    return tf.distribute.get_replica_context().merge_call(add, args=(list(tensors),))


def _reduced(vector: tf.Tensor) -> tf.Tensor:
    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, vector)


def _gathered(replicas: int, size: int) -> ReduceVector:
    def total(vector: tf.Tensor) -> tf.Tensor:
        rows = tf.raw_ops.CollectiveGatherV2(
            input=vector,
            group_size=replicas,
            group_key=_GATHERED,
            instance_key=_INSTANCE_KEY + size,
            ordering_token=[],
        )
        return tf.reduce_sum(tf.reshape(rows, [replicas, size]), axis=0)

    return total


def in_two_rings(worker: int, rows: int, columns: int, size: int) -> ReduceVector:
    """As `of_vectors`, for a worker of a grid of rows · columns."""
    row, column = divmod(worker, columns)

    def total(vector: tf.Tensor) -> tf.Tensor:
        # All of a row get the same bits, so all columns add the same numbers, in the same order.
        for members, group in ((columns, _ROWS + row), (rows, _COLUMNS + column)):
            vector = tf.raw_ops.CollectiveReduceV2(
                input=vector,
                group_size=members,
                group_key=group,
                instance_key=_INSTANCE_KEY + size,
                ordering_token=[],
                merge_op="Add",
                final_op="Id",
            )
        return vector

    return total
