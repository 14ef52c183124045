"""Requests to stop, as a file to select on.

They are SIGTERM, Ctrl-C, the terminal's end (SIGHUP), and the notice that schedulers can be told to
send before a time limit (SIGUSR1).
"""

import os
import signal


class StopRequests:
    """Collects the signals that ask this process to stop. One per process.

    Attributes:
        was_asked: whether one has been taken.
    """

    def __init__(self) -> None:
        self.was_asked = False
        self._wake, wake_in = os.pipe()
        os.set_blocking(self._wake, False)
        os.set_blocking(wake_in, False)
        # First: a signal that came between its handler and this would be lost.
        signal.set_wakeup_fd(wake_in, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            # Under nohup SIGHUP is ignored, and so it should stay.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda *_: None)

    def fileno(self) -> int:
        """Readable when there is a request to take."""
        return self._wake

    def take(self) -> list[int]:
        """Returns the signals that have come since the last call."""
        try:
            numbers = list(os.read(self._wake, 64))
        except BlockingIOError:
            return []
        self.was_asked = True
        return numbers
