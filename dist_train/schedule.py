"""Schedule: the order of the examples.

The order is a pure function of (seed, epoch, step). Every worker computes its own share of it, so
nothing depends on how many there are, and a resume needs the step number and nothing else.
"""

import dataclasses
import math

import tensorflow as tf

from dist_train.permutation import permuted

# After 4, as many as tf.random.experimental.index_shuffle has, the orders of two epochs still
# correlate by 0.65 to 0.75 (50,000 examples); from 12 on nothing is left to measure.
_ROUNDS = 16


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

        Replica r of R gets the columns r·b to (r+1)·b of each global batch, b = ceil(batch / R).
        What is missing at the end of a batch or of an epoch is -1 - i, for an example i of the
        same batch: what takes its place, with weight 0, must bring no inf or NaN of another one.
        """
        per_replica = math.ceil(self.batch_size / replicas)
        epoch, chunk = chunk // self.chunks_per_epoch, chunk % self.chunks_per_epoch
        step = chunk * self.chunk_steps + tf.range(self.chunk_steps, dtype=tf.int64)
        column = replica * per_replica + tf.range(per_replica, dtype=tf.int64)
        first = step[:, tf.newaxis] * self.batch_size
        position = first + column
        real = (column < self.batch_size) & (position < self.examples)
        # A step beyond the epoch is never done.
        stand_in = tf.where(first < self.examples, first, 0)
        ids = self._order(epoch, tf.reshape(tf.where(real, position, stand_in), [-1]))
        ids = tf.reshape(ids, real.shape)
        ids = tf.where(real, ids, -1 - ids)
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
        ids = tf.numpy_function(
            lambda places, key: permuted(places, key, self.examples, _ROUNDS),
            [position, key], tf.int64, stateful=False,
        )  # fmt: skip
        return tf.ensure_shape(ids, position.shape)


def rows_of(ids: tf.Tensor) -> tf.Tensor:
    """The examples that stand in the places of `ids`: padding -1 - i has example i."""
    return tf.maximum(ids, -1 - ids)
