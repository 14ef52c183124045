"""Profiling: some steps of a run under TensorFlow's profiler, for TensorBoard's Profile tab."""

import sys
from pathlib import Path

import tensorflow as tf
from absl import logging


class Profile:
    """Profiles the steps after `first` up to `last`.

    Args:
      steps: (first, last), or None: nothing is profiled.
      folder: where TensorBoard looks; None on workers other than the chief, whose calls end at the
        same steps nevertheless.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: Path | None):
        self._bounds = steps or ()
        self._folder = folder
        self._running = False
        self._is_due = bool(self._bounds) and folder is not None

    def steps_to_next(self, step: int) -> int:
        """Steps until `reach` must be called again; many, if never."""
        return min((bound - step for bound in self._bounds if bound > step), default=sys.maxsize)

    def reach(self, step: int) -> None:
        """To be called between two calls of the loop, at each boundary at least."""
        if not self._bounds or self._folder is None:
            return
        first, last = self._bounds
        if not self._running and first <= step < last:
            tf.profiler.experimental.start(str(self._folder))
            self._running, self._is_due = True, False
        elif self._running and step >= last:
            self.close()

    def close(self) -> None:
        """Writes what was gathered."""
        if self._running:
            self._running = False
            tf.profiler.experimental.stop()
        elif self._is_due:
            logging.warning("no profile: the run had no steps %s to %s", *self._bounds)
