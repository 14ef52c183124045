"""Watchdog: an upper bound for what cannot be interrupted, a wait inside TensorFlow's C++."""

import contextlib
import faulthandler
import os
import sys
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def bound(seconds: float, message: str) -> Iterator[None]:
    """Ends the process with status 1 if the body takes longer.

    A thread that hangs in a collective cannot be stopped from Python, so the process goes: the
    message and the stacks are printed, and the last checkpoint stays.

    Args:
      seconds: the bound.
      message: what was waited for and what to do about it; `{seconds}` is filled in.
    """

    def expire() -> None:
        print(f"error: {message.format(seconds=f'{seconds:g} s')}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        os._exit(1)

    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
