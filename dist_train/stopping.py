"""Stopping: a request to stop becomes a flag that the loop sees, also while TensorFlow runs.

A Python signal handler waits until the main thread returns from C++, which may be a whole loop of
steps away. The interpreter's wake-up descriptor is written at once, so a thread that reads it can
raise the flag in the midst of a loop.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from absl import logging

from dist_train.errors import Stopped

# SIGUSR1 is the notice that Slurm and others can be told to send before a time limit.
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# A scheduler and a launcher below it may both pass on one and the same request.
_SAME_REQUEST_S = 1.0


class StopRequest:
    """Whether this process was asked to stop.

    Args:
      grace_period_s: seconds from the request on in which this process ends, by itself or by force:
        a step that waits for a peer that has gone does not end.

    Attributes:
      signal: the signal that asked, or None.
      asked_at: when, on the monotonic clock in seconds.
      began: set once there is state to save; before that, a request ends the run on the spot.
    """

    def __init__(self, grace_period_s: float) -> None:
        self._grace_period_s = grace_period_s
        self._timer: threading.Timer | None = None
        self.asked_at = 0.0
        self.signal: signal.Signals | None = None
        self.began = False
        self._on_request: Callable[[], None] | None = None
        # TensorFlow's preemption notifier takes SIGTERM when a multi-worker strategy starts; to be
        # called after that.
        self.reclaim: Callable[[], object] = lambda: None

    def watch_from(self, callback: Callable[[], None]) -> None:
        """From now on a request is answered at the end of a step; `callback` raises the flag."""
        self._on_request = callback
        self.began = True
        if self.signal is not None:
            callback()

    def close(self) -> None:
        """The process goes on after the run: nothing is due any more."""
        if self._timer is not None:
            self._timer.cancel()

    def _arrived(self, number: int) -> None:
        """In the watching thread, at once."""
        now = time.monotonic()
        if self.signal is not None:
            if now - self.asked_at > _SAME_REQUEST_S:
                os._exit(128 + number)  # asked twice: leave at once
            return
        self.signal, self.asked_at = signal.Signals(number), now
        # A tenth is left to whoever kills at the end of the same period.
        self._timer = threading.Timer(0.9 * self._grace_period_s, self._expire)
        self._timer.daemon = True
        self._timer.start()
        if self._on_request is not None:
            self._on_request()

    def _expire(self) -> None:
        assert self.signal is not None
        print(
            f"stopped: by {self.signal.name}, but neither the step nor the saving ended within the"
            f" grace period of {self._grace_period_s:g} s; what was saved before is intact."
            " Raise --grace_period_s if more is needed",
            file=sys.stderr,
            flush=True,
        )
        os._exit(Stopped.exit_status)


@contextlib.contextmanager
def listening(grace_period_s: float = 30.0) -> Iterator[StopRequest]:
    """Within it, SIGTERM, SIGINT and SIGUSR1 are requests to stop; a second one leaves at once.

    Outside the main thread Python cannot handle signals; there, nothing is changed.

    Raises:
      Stopped: at the signal, if nothing had begun yet.
    """
    request = StopRequest(grace_period_s)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    handled = []

    def handle(number: int, frame: object) -> None:
        del frame
        handled.append(number)
        if len(handled) > 1:
            return  # the same request again; otherwise the process would have gone
        if request.began:
            logging.warning("%s: stopping after this step", signal.Signals(number).name)
        else:
            raise Stopped(f"by {signal.Signals(number).name} before the first step")

    def install() -> dict:
        return {number: signal.signal(number, handle) for number in _SIGNALS}

    request.reclaim = install
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    thread = threading.Thread(target=_read, args=(reader, request), daemon=True)
    thread.start()
    before = install()
    before_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield request
    finally:
        signal.set_wakeup_fd(before_fd)
        for number, handler in before.items():
            signal.signal(number, handler if request.signal is None else _deaf(request, handler))
        request.close()
        os.close(writer)  # ends the thread
        thread.join(timeout=1.0)
        os.close(reader)


def _deaf(request: StopRequest, handler: Any) -> Callable[[int, object], None]:
    """A handler that takes a signal for the same request still, and later ones as `handler` does.

    A run may have stopped before the second messenger comes.
    """

    def handle(number: int, frame: object) -> None:
        del frame
        if time.monotonic() - request.asked_at > _SAME_REQUEST_S:
            signal.signal(number, handler)
            signal.raise_signal(number)

    return handle


def _read(descriptor: int, request: StopRequest) -> None:
    while numbers := os.read(descriptor, 64):
        for number in numbers:
            if number in _SIGNALS:
                request._arrived(number)
