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
      most: steps per call, or None: what a float32 carries to the other workers.
      clock: a clock in seconds.

    Attributes:
      seconds: that the last call took.
      wish: what a call should make by this process's own clock.
      steps: what the next call makes at most: the chief's wish, which arrived with the call before;
        see `step.TrainLoop`.
    """

    _TARGET_S = 1.0
    _MOST = 1 << 20

    def __init__(self, most: int | None, clock: Callable[[], float] = time.perf_counter):
        self._most = min(most or self._MOST, self._MOST)
        self._clock = clock
        self._calls = 0
        self.seconds = 0.0
        self.wish = self.steps = 1

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """Around a call of the loop."""
        begin = self._clock()
        yield
        self.seconds = self._clock() - begin

    def done(self, steps: int, *, agreed: int) -> None:
        """To be called after each call.

        Args:
          steps: how many it has made.
          agreed: the chief's wish, the same on all workers.
        """
        self.steps = agreed
        self._calls += 1
        if self._calls > 1:  # the first call traces and compiles
            timely = int(self._TARGET_S * steps / max(self.seconds, 1e-6))
            self.wish = max(1, min(self._most, timely))
