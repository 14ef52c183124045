"""Input: the order of the examples, and the distributed datasets that follow it.

The order is a pure function of (seed, epoch, step). Every worker computes its own share of it, so
nothing depends on how many there are, and a resume needs the step number and nothing else.

Data travels in chunks of many steps, because a compiled loop of steps cannot ask a dataset for its
next element. Where the examples live on the device a chunk is only their indices; where they are
streamed it carries the examples too.
"""

import dataclasses
import itertools
import math
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from dist_train.buffers import Buffers
from dist_train.errors import UsageError
from dist_train.examples import Arrays, Dataset, Source

# The public tf.random.experimental.index_shuffle has 4 rounds, after which the orders of two epochs
# still correlate by 0.65 to 0.75 (50,000 examples); from 12 on nothing is left to measure.
_SHUFFLE_ROUNDS = 16
_STREAM_CHUNK_BYTES = 32 << 20
_RESIDENT_CHUNK_STEPS = 4096
_RESIDENT_LIMIT_BYTES = 2 << 30
_MAX_EXAMPLES = 2**31 - 1  # indices are int32 on the device


class Chunk(NamedTuple):
    """What one replica needs for up to S steps of b examples each.

    Attributes:
      ids: [S, b] int32 indices into the source; -1 is padding, of weight 0.
      epoch: [] int32.
      examples: (x, y) with arrays [S * b, …] in the order of `ids`, or () where the examples are
        resident.
    """

    ids: tf.Tensor
    epoch: tf.Tensor
    examples: Any

    def batch(self, step: tf.Tensor, resident: Any) -> tuple[Any, tf.Tensor]:
        """(examples, ids) of a step: (x, y) with arrays [b, …], and [b] int32.

        Args:
          step: within the chunk.
          resident: the examples where they live on the device, or ().
        """
        ids = self.ids[step]
        if self.examples == ():
            rows = tf.maximum(ids, 0)
            return tf.nest.map_structure(lambda array: tf.gather(array, rows), resident), ids

        def part(array: tf.Tensor) -> tf.Tensor:
            # No gather: of this XLA reads only what `preprocess` uses.
            return tf.reshape(array, [*self.ids.shape, *array.shape[1:]])[step]

        return tf.nest.map_structure(part, self.examples), ids


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """Which examples each step sees.

    Attributes:
      examples: how many there are.
      batch_size: the global batch.
      seed: of the order.
      shuffle: a new order each epoch, or the order of the source.
      chunk_steps: steps per chunk; a chunk never spans two epochs.
    """

    examples: int
    batch_size: int
    seed: int = 0
    shuffle: bool = False
    chunk_steps: int

    @property
    def steps_per_epoch(self) -> int:
        """Steps that an epoch takes, its last, partial batch included."""
        return math.ceil(self.examples / self.batch_size)

    @property
    def chunks_per_epoch(self) -> int:
        """Chunks that an epoch takes."""
        return math.ceil(self.steps_per_epoch / self.chunk_steps)

    def locate(self, step: int) -> tuple[int, int, int]:
        """(chunk, first step within the chunk, steps that the chunk still has) at a global step."""
        epoch, within = divmod(step, self.steps_per_epoch)
        chunk, start = divmod(within, self.chunk_steps)
        left = min(self.chunk_steps, self.steps_per_epoch - chunk * self.chunk_steps) - start
        return epoch * self.chunks_per_epoch + chunk, start, left

    def examples_until(self, step: int) -> int:
        """Examples that were seen when `step` steps are done."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return epoch * self.examples + min(within * self.batch_size, self.examples)

    def share(self, chunk: tf.Tensor, replica: tf.Tensor, replicas: int) -> tuple:
        """(ids [S, b] int32, epoch [] int32): one replica's part of a chunk's global batches.

        Replica r of R gets the columns r·b to (r+1)·b of each global batch, b = ceil(batch / R);
        what is missing at the end of a batch or of an epoch is -1.
        """
        per_replica = math.ceil(self.batch_size / replicas)
        epoch, chunk = chunk // self.chunks_per_epoch, chunk % self.chunks_per_epoch
        step = chunk * self.chunk_steps + tf.range(self.chunk_steps, dtype=tf.int64)
        column = replica * per_replica + tf.range(per_replica, dtype=tf.int64)
        position = step[:, tf.newaxis] * self.batch_size + column
        real = (column < self.batch_size) & (position < self.examples)
        ids = self._order(epoch, tf.reshape(tf.where(real, position, 0), [-1]))
        ids = tf.where(real, tf.reshape(ids, real.shape), -1)
        return tf.cast(ids, tf.int32), tf.cast(epoch, tf.int32)

    def _order(self, epoch: tf.Tensor, position: tf.Tensor) -> tf.Tensor:
        """The indices of the examples at these places of an epoch's order, [n] int64."""
        if not self.shuffle:
            return position
        # Neighbouring seeds give related orders, so the key is drawn from a generator instead.
        key = tf.random.stateless_uniform(
            [3], seed=tf.stack([tf.constant(self.seed, tf.int64), epoch]),
            minval=None, maxval=None, dtype=tf.uint32, alg="philox",
        )  # fmt: skip
        return tf.raw_ops.RandomIndexShuffle(
            index=position,
            seed=key,
            max_index=tf.constant(self.examples - 1, tf.int64),
            rounds=_SHUFFLE_ROUNDS,
        )


class Input:
    """A source of examples, as the replicas of a strategy read it.

    Args:
      source: the examples.
      strategy: whose replicas read them.
      resident: whether they live on every device, or are streamed.
      batch_size, seed, shuffle: see Schedule.

    Attributes:
      schedule: which examples each step sees.
      resident: as given.
      data: the examples on each device, as an argument of strategy.run; () where streamed.
    """

    def __init__(
        self,
        source: Source,
        strategy: tf.distribute.Strategy,
        *,
        resident: bool,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = False,
    ):
        if len(source) > _MAX_EXAMPLES:
            raise UsageError(f"{len(source)} examples; more than {_MAX_EXAMPLES} are not supported")
        self._source = source
        self._strategy = strategy
        self.resident = resident
        steps = math.ceil(len(source) / batch_size)
        limit = _RESIDENT_CHUNK_STEPS if resident else self._stream_steps(batch_size)
        self.schedule = Schedule(
            examples=len(source),
            batch_size=batch_size,
            seed=seed,
            shuffle=shuffle and not isinstance(source, Dataset),
            chunk_steps=max(1, min(steps, limit)),
        )
        self._first_epoch: list[tuple[Chunk, int]] | None = None
        self.data: Any = self._place() if resident else ()

    def chunks(self, first: int, *, once: bool = False) -> Iterator[Chunk]:
        """The chunks from number `first` on, without end, distributed over the replicas.

        Args:
          first: a chunk's number.
          once: whether nobody will ask for those of another epoch.

        Raises:
          Exception: whatever the source raises, or what it gives is not what it has announced.
        """
        failures: list[Exception] = []

        def dataset(context: tf.distribute.InputContext) -> tf.data.Dataset:
            if isinstance(self._source, Dataset):
                return self._sequential(self._source, context, first, once, failures)
            return self._dataset(context, first, failures)

        chunks = iter(self._strategy.distribute_datasets_from_function(dataset))
        while True:
            try:
                chunk = next(chunks)
            except tf.errors.OpError:
                if failures:  # TensorFlow's words for it are a traceback
                    raise failures[0] from None
                raise
            yield chunk

    def first_epoch(self) -> Iterator[tuple[Chunk, int]]:
        """(chunk, its steps) of one pass; an evaluation asks for the same one again and again."""
        if self._first_epoch is not None:
            yield from self._first_epoch
            return
        plan, seen = self.schedule, []
        for number, chunk in zip(
            range(plan.chunks_per_epoch), self.chunks(0, once=True), strict=False
        ):
            item = chunk, plan.locate(number * plan.chunk_steps)[2]
            if self.resident:  # indices alone: small enough to keep
                seen.append(item)
            yield item
        self._first_epoch = seen or None

    def _place(self) -> Any:
        """The arrays, once on the device of each replica of this process."""
        assert isinstance(self._source, Arrays)
        tree = (self._source.x, self._source.y)
        if self._strategy.num_replicas_in_sync == 1:
            return tf.nest.map_structure(tf.constant, tree)
        copies = []
        for device in self._strategy.extended.worker_devices:
            with tf.device(device):
                copies.append(tf.nest.map_structure(tf.constant, tree))
        return self._strategy.experimental_distribute_values_from_function(
            lambda context: copies[context.replica_id_in_sync_group % len(copies)]
        )

    def _dataset(
        self, context: tf.distribute.InputContext, first: int, failures: list[Exception]
    ) -> tf.data.Dataset:
        """The chunks of the replicas of this worker in turn: chunk 0 of each, chunk 1 of each, …"""
        replicas = context.num_replicas_in_sync
        local = replicas // context.num_input_pipelines
        begin = context.input_pipeline_id * local

        @tf.autograph.experimental.do_not_convert  # nothing in it needs to be, and it takes time
        def chunk(number: tf.Tensor) -> tuple:
            ids, epoch = self.schedule.share(number // local, begin + number % local, replicas)
            return Chunk(ids, epoch, () if self.resident else self._read(ids, failures))

        # Without an end: the end of a distributed dataset costs a collective at every element.
        numbers = tf.data.Dataset.counter(first * local)
        dataset = numbers.map(chunk, num_parallel_calls=local, deterministic=True)
        return _settled(dataset.prefetch(2 * local))

    def _sequential(
        self,
        source: Dataset,
        context: tf.distribute.InputContext,
        first: int,
        once: bool,
        failures: list[Exception],
    ) -> tf.data.Dataset:
        """As `_dataset`, of examples that can be read in one order only.

        A block has the examples of one chunk for all replicas of all workers; each worker cuts out
        what its own replicas need.
        """
        plan = self.schedule
        replicas = context.num_replicas_in_sync
        local = replicas // context.num_input_pipelines
        begin = context.input_pipeline_id * local
        size = plan.chunk_steps * plan.batch_size
        example = source[np.zeros(1, np.int64)]
        spec = tf.nest.map_structure(
            lambda spec, array: tf.TensorSpec([None, *array.shape[1:]], spec.dtype),
            source.made(0).element_spec,
            example,
        )

        def blocks() -> Iterator[Any]:
            epoch, chunk = divmod(first, plan.chunks_per_epoch)
            try:
                for number in itertools.count(epoch):
                    yield from source.blocks(number, size, skip=chunk * size)
                    chunk = 0
                    while once:  # what is read ahead: nobody will use it
                        yield example
            except Exception as error:
                failures.append(error)
                raise

        @tf.autograph.experimental.do_not_convert
        def cut(number: tf.Tensor, block: Any) -> Chunk:
            start = tf.cast(number % plan.chunks_per_epoch * size, tf.int32)

            def chunk(replica: int) -> Chunk:
                ids, epoch = plan.share(number, tf.constant(begin + replica, tf.int64), replicas)
                rows = tf.reshape(tf.where(ids >= 0, ids - start, 0), [-1])
                return Chunk(ids, epoch, tf.nest.map_structure(lambda a: tf.gather(a, rows), block))

            each = [chunk(replica) for replica in range(local)]
            return tf.nest.map_structure(lambda *parts: tf.stack(parts), *each)

        read = tf.data.Dataset.from_generator(blocks, output_signature=spec)
        numbered = tf.data.Dataset.zip(tf.data.Dataset.counter(first), read)
        return _settled(numbered.map(cut).unbatch().prefetch(2 * local))

    def _read(self, ids: tf.Tensor, failures: list[Exception]) -> Any:
        """(x, y) with arrays [S * b, …] of the examples `ids`; padding repeats example 0."""
        template = _fetch(self._source, np.zeros(1, np.int64))
        flat = tf.nest.flatten(template)
        buffers = Buffers()

        def gather(rows: np.ndarray) -> list[np.ndarray]:
            rows = np.maximum(rows, 0)
            try:
                if isinstance(self._source, Arrays):
                    whole = tf.nest.flatten((self._source.x, self._source.y))
                    return [buffers.take(array, rows) for array in whole]
                return [buffers.copy(a) for a in tf.nest.flatten(_fetch(self._source, rows))]
            except Exception as error:
                failures.append(error)
                raise

        rows = tf.reshape(ids, [-1])
        arrays = tf.numpy_function(gather, [rows], [array.dtype for array in flat])
        for array, like in zip(arrays, flat, strict=True):
            array.set_shape([rows.shape[0], *like.shape[1:]])
        return tf.nest.pack_sequence_as(template, arrays)

    def _stream_steps(self, batch_size: int) -> int:
        example = _fetch(self._source, np.zeros(1, np.int64))
        example_bytes = sum(array.nbytes for array in tf.nest.flatten(example))
        return max(1, _STREAM_CHUNK_BYTES // max(1, example_bytes * batch_size))


def _fetch(source: Source, indices: np.ndarray) -> tuple[Any, Any]:
    """(x, y) of the examples at `indices`, arrays of that length.

    Raises:
      UsageError: the source gives something else.
    """
    name, count = f"{type(source).__name__}.__getitem__", len(indices)
    try:
        found = source[indices.astype(np.int64)]
    except (TypeError, IndexError) as error:
        raise UsageError(f"{name} failed for an array of {count} indices: {error}") from error
    if not isinstance(found, tuple | list) or len(found) != 2:
        raise UsageError(f"{name} gave a {type(found).__name__}; it must give (x, y)")
    found = tf.nest.map_structure(np.asarray, tuple(found))
    for array in tf.nest.flatten(found):
        if array.shape[:1] != (count,):
            raise UsageError(
                f"{name} gave an array of shape {list(array.shape)} for {count} indices; the first"
                " axis of each must have that length"
            )
    return found


def _settled(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """The dataset without autotuning: its parallelism is given.

    The thread that tunes sleeps for up to a minute, and sometimes misses that its iterator is to be
    deleted, which waits for it: one end of a run in three took 10 to 30 s longer.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


def choose(mode: str, sources: list[Source], replicas: int) -> tuple[bool, str]:
    """(resident?, why) for a mode of auto, resident or stream.

    Raises:
      UsageError: resident was asked for, but the examples are not arrays.
    """
    arrays = [source for source in sources if isinstance(source, Arrays)]
    if mode == "resident":
        if len(arrays) < len(sources):
            raise UsageError(
                "input=resident needs dist_train.Arrays; use --input=stream for other sources"
            )
        return True, "asked for"
    if mode == "stream":
        return False, "asked for"
    if len(arrays) < len(sources):
        return False, "the source is not arrays"
    if not all(array.in_memory for array in arrays):
        return False, "an array is a file"
    size = sum(array.nbytes for array in arrays)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = min(_RESIDENT_LIMIT_BYTES, memory // 4 // replicas)
    if size > limit:
        return False, f"{size / 2**20:.0f} MiB is above {limit / 2**20:.0f} MiB per device"
    return True, f"{size / 2**20:.0f} MiB per device"
