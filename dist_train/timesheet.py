"""Timesheet: which share of a run's time goes where."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence


class Timesheet:
    """Shares of the wall time, by what it was spent on.

    Args:
      names: what time is counted for; all of them are in each report.
      clock: in seconds.
    """

    def __init__(self, names: Sequence[str], clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._spent = dict.fromkeys(names, 0.0)
        self._since = clock()

    @contextlib.contextmanager
    def on(self, name: str) -> Iterator[None]:
        """Counts the time of the body."""
        begin = self._clock()
        try:
            yield
        finally:
            self.add(name, self._clock() - begin)

    def add(self, name: str, seconds: float) -> None:
        """Counts time that was measured elsewhere."""
        self._spent[name] += seconds

    def take(self) -> dict[str, float]:
        """{name: 0 to 1} of the time since this was asked last; 'compute' is the rest."""
        now = self._clock()
        elapsed = max(now - self._since, 1e-9)
        shares = {name: min(1.0, seconds / elapsed) for name, seconds in self._spent.items()}
        self._spent, self._since = dict.fromkeys(self._spent, 0.0), now
        return shares | {"compute": max(0.0, 1.0 - sum(shares.values()))}
