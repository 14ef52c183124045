"""Input: the distributed datasets that bring the examples of a schedule to the replicas.

Data travels in chunks of many steps, because a compiled loop of steps cannot ask a dataset for its
next element. Where the examples live on the device a chunk is only their indices; where they are
streamed it carries the examples too.
"""

import itertools
import math
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from dist_train import reading
from dist_train.errors import UsageError
from dist_train.examples import Arrays, Dataset, Source
from dist_train.schedule import Schedule, rows_of

_STREAM_CHUNK_BYTES = 32 << 20
_READERS = 2
_CHUNKS_AHEAD = 3  # of each replica; they are read, or wait
_RESIDENT_CHUNK_STEPS = 4096
_RESIDENT_LIMIT_BYTES = 2 << 30
_MAX_EXAMPLES = 2**31 - 1  # indices are int32 on the device


class Chunk(NamedTuple):
    """What one replica needs for up to S steps of b examples each.

    Attributes:
      ids: [S, b] int32 indices into the source; below 0: padding, of weight 0, see `rows_of`.
      epoch: [] int32.
      examples: (x, y) with arrays [S * b, …] in the order of `ids`, or () where the examples are
        resident.
    """

    ids: tf.Tensor
    epoch: tf.Tensor
    examples: Any

    def batch(
        self, step: tf.Tensor, resident: Any, lane: int = 0, lanes: int = 1
    ) -> tuple[Any, tf.Tensor]:
        """(examples, ids) of a step: (x, y) with arrays [b, …], and [b] int32.

        Args:
          step: within the chunk.
          resident: the examples where they live on the device, or ().
          lane, lanes: only this one of so many equal parts of them, [b / lanes, …].
        """
        size = self.ids.shape[1] // lanes

        def part(array: tf.Tensor) -> tf.Tensor:
            return array[lane * size : (lane + 1) * size] if lanes > 1 else array

        ids = part(self.ids[step])
        if self.examples == ():
            rows = rows_of(ids)
            return tf.nest.map_structure(lambda array: tf.gather(array, rows), resident), ids

        def some(array: tf.Tensor) -> tf.Tensor:
            # No gather: of this XLA reads only what `preprocess` uses.
            return part(tf.reshape(array, [*self.ids.shape, *array.shape[1:]])[step])

        return tf.nest.map_structure(some, self.examples), ids


class Input:
    """A source of examples, as the replicas of a strategy read it.

    Args:
      source: the examples.
      strategy: whose replicas read them.
      resident: whether they live on every device, or are streamed.
      batch_size, seed, shuffle: see Schedule.
      also_streamed: whether another worker streams what is resident here, or the reverse. All must
        get the same chunks: a call of the loop ends with one, an evaluation has a collective for
        each.

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
        also_streamed: bool = False,
    ):
        if len(source) > _MAX_EXAMPLES:
            raise UsageError(f"{len(source)} examples; more than {_MAX_EXAMPLES} are not supported")
        self._source = source
        self._strategy = strategy
        self.resident = resident
        steps = math.ceil(len(source) / batch_size)
        streamed = not resident or also_streamed
        limit = _RESIDENT_CHUNK_STEPS
        if streamed:
            limit = reading.examples_within(_STREAM_CHUNK_BYTES, source) // batch_size
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
        # Of a stream only what is no more than waits for the next step of the training anyway; a
        # dataset made anew takes 50 ms, as long as all 10,000 examples of MNIST.
        keep = self.resident or plan.chunks_per_epoch == 1
        for number, chunk in zip(
            range(plan.chunks_per_epoch), self.chunks(0, once=True), strict=False
        ):
            item = chunk, plan.locate(number * plan.chunk_steps)[2]
            if keep:
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
        # One thread that copies reaches neither what memory gives nor what a fast disk does. What a
        # user has written may not be made for more than a thread a replica.
        readers = max(local, _READERS) if isinstance(self._source, Arrays) else local
        dataset = numbers.map(chunk, num_parallel_calls=readers, deterministic=True)
        return _settled(dataset.prefetch(_CHUNKS_AHEAD * local - readers))

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
                # Those of steps beyond the epoch may lie anywhere.
                rows = tf.reshape(tf.maximum(rows_of(ids) - start, 0), [-1])
                return Chunk(ids, epoch, tf.nest.map_structure(lambda a: tf.gather(a, rows), block))

            each = [chunk(replica) for replica in range(local)]
            return tf.nest.map_structure(lambda *parts: tf.stack(parts), *each)

        read = tf.data.Dataset.from_generator(blocks, output_signature=spec)
        numbered = tf.data.Dataset.zip(tf.data.Dataset.counter(first), read)
        return _settled(numbered.map(cut).unbatch().prefetch(2 * local))

    def _read(self, ids: tf.Tensor, failures: list[Exception]) -> Any:
        """(x, y) with arrays [S * b, …] of the examples `ids`."""
        with tf.init_scope():  # a source may use TensorFlow itself
            reader = reading.Reader(self._source)
        flat = tf.nest.flatten(reader.template)

        def gather(rows: np.ndarray) -> list[np.ndarray]:
            try:
                return reader.read(rows)
            except Exception as error:
                failures.append(error)
                raise

        rows = tf.reshape(rows_of(ids), [-1])
        arrays = tf.numpy_function(gather, [rows], [array.dtype for array in flat])
        for array, like in zip(arrays, flat, strict=True):
            array.set_shape([rows.shape[0], *like.shape[1:]])
        return tf.nest.pack_sequence_as(reader.template, arrays)


class Forward:
    """A way through the chunks of an input that never turns back, from wherever a run begins."""

    def __init__(self, source: Input):
        self._input = source
        self._chunks: Iterator[Chunk] | None = None
        self._number = -1

    def at(self, step: int) -> tuple[Chunk, int, int]:
        """(chunk, place of `step` in it, steps that it still has), for a rising `step`.

        Its chunk is that of the call before or the next one. Raises as `Input.chunks` does.
        """
        number, place, left = self._input.schedule.locate(step)
        if number != self._number:
            self._chunks = self._chunks or self._input.chunks(number)
            self._chunk, self._number = next(self._chunks), number
        return self._chunk, place, left


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
