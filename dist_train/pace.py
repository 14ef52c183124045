"""Pace: how many steps a call of the loop should make."""

import contextlib
import time
from collections.abc import Callable, Iterator


class Pace:
    """Chooses the steps of the next call: about a second's worth.

    A call cannot be interrupted, and its lines of the log come at its end; but each call costs a
    millisecond. The first ones are single steps, as they may be slow. The numbers of the training
    do not depend on it.

    Args:
      fixed: steps per call, or None to adapt.
      clock: a clock in seconds.

    Attributes:
      seconds: that the last call took.
      wish: what a call should make by this process's own clock. With several workers it is the
        chief's that counts, and it arrives with the call before; see `step.TrainLoop`.
    """

    _TARGET_S = 1.0
    _MOST = 1 << 20  # a float32 carries it to the other workers

    def __init__(self, fixed: int | None, clock: Callable[[], float] = time.perf_counter):
        self._fixed = fixed
        self._clock = clock
        self._calls = 0
        self.seconds = 0.0
        self.wish = fixed or 1

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """Around a call of the loop."""
        begin = self._clock()
        yield
        self.seconds = self._clock() - begin

    def done(self, steps: int) -> None:
        """After a call that made so many steps."""
        self._calls += 1
        if self._fixed is None and self._calls > 1:  # the first call traces and compiles
            self.wish = min(
                self._MOST, max(1, int(self._TARGET_S * steps / max(self.seconds, 1e-6)))
            )
