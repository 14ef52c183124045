"""Divergence: what follows when a loss is not finite, or the replicas' weights differ."""

from collections.abc import Callable, Sequence

import numpy as np
from absl import logging

from dist_train.errors import RunError
from dist_train.line import Line
from dist_train.workers import Workers

_MOST_SKIPPED = 100  # steps in a row


class Divergence:
    """What the steps have shown so far.

    Args:
      on_nan: as the flag: "stop", "skip" or "restore".
      workers: who compares weights.
      weight_digests: a number of 32 bits for the weights of each replica of this process.
    """

    def __init__(self, on_nan: str, workers: Workers, weight_digests: Callable[[], Sequence[int]]):
        self._on_nan = on_nan
        self._workers = workers
        self._weight_digests = weight_digests
        self._skipped = 0

    def check(self, step: int, line: Line) -> bool:
        """Acts on what the last step of a line has shown.

        Args:
          step: its number.

        Returns:
          Whether the training has to go back, since --on_nan=restore says so.

        Raises:
          RunError: going on is useless.
        """
        if line.diverged:
            with self._workers.together("the comparison of the weights"):
                who = self._workers.who_differs(self._weight_digests())
            raise RunError(
                f"the replicas' weights differ since step {step - 1}, which must not happen: {who};"
                " start again from the last checkpoint"
            )
        loss = line.last_loss
        if np.isfinite(loss):
            self._skipped = 0
            return False
        if self._on_nan == "stop":
            # No update has been made before the first one.
            remedy = (
                "Look at the examples, labels, loss function and initial weights"
                if step == 1
                else "Try a smaller --learning_rate, --clip_norm, or --on_nan=skip"
            )
            raise RunError(
                f"the loss of step {step} is {loss}; what was saved before is kept. {remedy}"
            )
        if self._on_nan == "restore":
            return True
        # Within a line all steps but the last are finite.
        self._skipped = 1 if line.steps > 1 else self._skipped + 1
        if self._skipped > _MOST_SKIPPED:
            raise RunError(
                f"no step was finite since step {step - self._skipped}; what was saved before is"
                " kept. Try a smaller --learning_rate, or look at the examples"
            )
        self._workers.log(
            logging.WARNING, "step %s is left out: its loss or gradient is not finite", step
        )
        return False
