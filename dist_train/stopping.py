"""Stopping: a request to stop becomes a flag that the loop sees, also while TensorFlow runs.

A Python signal handler waits until the main thread returns from C++, which may be a whole loop of
steps away. The interpreter's wake-up descriptor is written at once, so a thread that reads it can
raise the flag in the midst of a loop.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

from absl import logging

from dist_train.errors import Stopped

# SIGUSR1 is the notice that Slurm and others can be told to send before a time limit.
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Whether this process was asked to stop.

    Attributes:
      signal: the signal that asked, or None.
      began: set once there is state to save; before that, a request ends the run on the spot.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.began = False
        self._on_request: Callable[[], None] | None = None
        self._count = 0
        # TensorFlow's preemption notifier takes SIGTERM when a multi-worker strategy starts; to be
        # called after that.
        self.reclaim: Callable[[], object] = lambda: None

    def watch_from(self, callback: Callable[[], None]) -> None:
        """From now on a request is answered at the end of a step; `callback` raises the flag."""
        self._on_request = callback
        self.began = True
        if self.signal is not None:
            callback()

    def _arrived(self, number: int) -> None:
        """In the watching thread, at once."""
        self._count += 1
        if self._count > 1:
            os._exit(128 + number)  # asked twice: leave at once
        self.signal = signal.Signals(number)
        if self._on_request is not None:
            self._on_request()


@contextlib.contextmanager
def listening() -> Iterator[StopRequest]:
    """Within it, SIGTERM, SIGINT and SIGUSR1 are requests to stop; a second one leaves at once.

    Outside the main thread Python cannot handle signals; there, nothing is changed.

    Raises:
      Stopped: at the signal, if nothing had begun yet.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(number: int, frame: object) -> None:
        del frame
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
            signal.signal(number, handler)
        os.close(writer)  # ends the thread
        thread.join(timeout=1.0)
        os.close(reader)


def _read(descriptor: int, request: StopRequest) -> None:
    while numbers := os.read(descriptor, 64):
        for number in numbers:
            if number in _SIGNALS:
                request._arrived(number)
