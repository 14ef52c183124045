"""Line: what a line of the log is told of some training steps, and how it leaves their loop."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from dist_train.agreement import agree
from dist_train.program import LOSS


class Signals(NamedTuple):
    """What all workers must know in the same step.

    They travel behind the sums of the step, in the tail of the vector that is reduced.

    Attributes:
      next_steps: how many steps the chief would like the next call to make.
      stops: how many workers were asked to stop.
      hashes, squares: the sums of the replicas' weight hashes, and of their squares.
    """

    next_steps: Any
    stops: Any = 0.0
    hashes: Any = 0.0
    squares: Any = 0.0

    @classmethod
    def of(cls, tail: Any) -> "Signals":
        """Those at the end of a tail, [sums + signals]."""
        return cls(*(tail[place] for place in range(-len(cls._fields), 0)))


SIGNALS = len(Signals._fields)


def record(
    sums: tf.Tensor, tail: tf.Tensor, gradient_norm: tf.Tensor, learning_rate: tf.Tensor
) -> tf.Tensor:
    """[record_size] float32, from which `Line.of` makes a line.

    Args:
      sums: [sums] over the steps of the line.
      tail: [sums + signals] of its last step.
      gradient_norm, learning_rate: [], see `Line`.
    """
    return tf.concat([sums, tail, tf.stack([gradient_norm, learning_rate])], 0)


def record_size(sums: int) -> int:
    """How many numbers a record of so many sums has."""
    return 2 * sums + SIGNALS + 2


@dataclasses.dataclass(frozen=True)
class Line:
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

    @property
    def last_loss(self) -> float:
        """The summed loss of the last step's global batch."""
        return float(self.last[LOSS])

    @classmethod
    def of(cls, steps: int, values: np.ndarray, sums: int, replicas: int) -> "Line":
        """From a `record` of so many sums, over so many replicas."""
        numbers = values.astype(np.float64)
        signals = Signals.of(values[: 2 * sums + SIGNALS])
        gradient_norm, learning_rate = numbers[2 * sums + SIGNALS :]
        return cls(
            steps=steps,
            sums=numbers[:sums],
            last=numbers[sums : 2 * sums],
            gradient_norm=float(gradient_norm),
            learning_rate=float(learning_rate),
            next_steps=int(signals.next_steps),
            stop=bool(signals.stops > 0),
            diverged=not agree(replicas, signals.hashes, signals.squares),
        )
