"""Metrics: exact sums of many steps become means and rates."""

from collections.abc import Sequence

import numpy as np


def means(names: Sequence[str], sums: np.ndarray) -> dict[str, float]:
    """The exact means over examples.

    Args:
      names: of the sums; one of them is 'weight', the number of examples.
      sums: [len(names)] float64.
    """
    weight = float(sums[list(names).index("weight")])
    return {
        name: float(total) / weight if weight else float("nan")
        for name, total in zip(names, sums, strict=True)
        if name != "weight"
    }


class Tally:
    """The sums since the last line of the log, and the time that their steps took.

    Args:
      names: of the sums; see `means`.
      sums: [len(names)] float64 to go on from, whose time is not known; None: zeros.
    """

    def __init__(self, names: Sequence[str], sums: np.ndarray | None = None):
        self._names = names
        self.sums = np.zeros(len(names)) if sums is None else sums
        self._seconds = 0.0
        self._untimed = self._examples()

    def add(self, sums: np.ndarray, seconds: float) -> None:
        """Counts further steps."""
        self.sums = self.sums + sums
        self._seconds += seconds

    def means(self) -> dict[str, float]:
        """The means over all examples."""
        return means(self._names, self.sums)

    def examples_per_second(self) -> float:
        """The rate of the examples whose time is known."""
        return (self._examples() - self._untimed) / max(self._seconds, 1e-9)

    def _examples(self) -> float:
        return float(self.sums[list(self._names).index("weight")])
