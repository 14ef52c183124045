"""Best: the best validation of a run so far, and how long ago it was."""

import math

import numpy as np
import tensorflow as tf

_ROUNDING = 1e-6


class Best:
    """The best value that a metric had in a validation.

    Args:
      least: whether the least value is the best, or the greatest.

    Attributes:
      variable: [3] float64, part of the run's state: the best value and its step, not a number
        before the first validation, and how many validations there were since.
    """

    def __init__(self, *, least: bool):
        self._least = least
        with tf.device("CPU:0"):
            none = np.array([np.nan, np.nan, 0.0])
            self.variable = tf.Variable(none, trainable=False, name="best")

    @property
    def value(self) -> float:
        """Of the metric; not a number before the first validation."""
        return float(self.variable.numpy()[0])

    @property
    def step(self) -> int | None:
        """After which the validation was; None before the first one."""
        step = self.variable.numpy()[1]
        return None if math.isnan(step) else int(step)

    @property
    def since(self) -> int:
        """How many validations there were since, none of them better."""
        return int(self.variable.numpy()[2])

    def forget(self) -> None:
        """As before the first validation."""
        self.variable.assign([math.nan, math.nan, 0.0])

    def see(self, value: float, step: int) -> bool:
        """Counts a validation; whether it is the best.

        A gain within the rounding of a float32 sum is none: where a run has converged, another
        number of replicas would otherwise end at another step.
        """
        best, at, since = self.variable.numpy().tolist()
        margin = _ROUNDING * abs(best) if math.isfinite(best) else 0.0
        gains = value < best - margin if self._least else value > best + margin
        is_best = not math.isnan(value) and (math.isnan(best) or gains)
        self.variable.assign([value, step, 0.0] if is_best else [best, at, since + 1])
        return is_best
