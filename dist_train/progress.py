"""Progress: what a line of the log is told of some training steps, and how it leaves their loop."""

import dataclasses

import numpy as np
import tensorflow as tf

from dist_train.agreement import agree

# The tail that a step reduces is its sums, and what all workers must know in the same step: the
# chief's proposal for the length of the next call, the count of workers that were asked to stop,
# and the sums of the weight hashes and of their squares.
SIGNALS = 4


def record(
    sums: tf.Tensor, tail: tf.Tensor, gradient_norm: tf.Tensor, learning_rate: tf.Tensor
) -> tf.Tensor:
    """[record_size] float32: what `Progress.of` reads; see there."""
    return tf.concat([sums, tail, tf.stack([gradient_norm, learning_rate])], 0)


def record_size(sums: int) -> int:
    """How many numbers a record of so many sums has."""
    return 2 * sums + SIGNALS + 2


@dataclasses.dataclass(frozen=True)
class Progress:
    """What some steps in a row did.

    Attributes:
      steps: how many steps were done.
      sums: [sums] float64, over these steps.
      last: [sums] float64, of the last step's global batch.
      gradient_norm: of the last step, if the line was not cut short: the global L2 norm of the
        gradient of the mean over the global batch, before clipping.
      learning_rate: of the last update.
      next_steps: what the chief would like the next call to make; the same on all workers.
      stop: whether a worker was asked to stop.
      diverged: whether the replicas' weights differed before the last step.
    """

    steps: int
    sums: np.ndarray
    last: np.ndarray
    gradient_norm: float
    learning_rate: float
    next_steps: int
    stop: bool
    diverged: bool

    @classmethod
    def of(cls, steps: int, values: np.ndarray, sums: int, replicas: int) -> "Progress":
        """From a `record` of so many sums, over so many replicas."""
        numbers = values.astype(np.float64)
        next_steps, stops, hashes, squares = values[2 * sums : 2 * sums + SIGNALS]
        gradient_norm, learning_rate = numbers[2 * sums + SIGNALS :]
        return cls(
            steps=steps,
            sums=numbers[:sums],
            last=numbers[sums : 2 * sums],
            gradient_norm=float(gradient_norm),
            learning_rate=float(learning_rate),
            next_steps=int(next_steps),
            stop=bool(stops > 0),
            diverged=not agree(replicas, hashes, squares),
        )
