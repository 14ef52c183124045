"""Watchdog: an upper bound for what cannot be interrupted, a wait inside TensorFlow's C++."""

import contextlib
import faulthandler
import os
import sys
import threading
from collections.abc import Callable, Iterator

_EXPLAIN_S = 10.0


@contextlib.contextmanager
def bound(
    seconds: float, message: str, *, explain: Callable[[], str] = lambda: ""
) -> Iterator[None]:
    """Ends the process with status 1 if the body takes longer.

    A thread that hangs in a collective cannot be stopped from Python, so the process goes: the
    message and the stacks are printed, and the last checkpoint stays.

    Args:
      seconds: the bound.
      message: what was waited for and what to do about it; `{seconds}` is filled in.
      explain: asked at the end for what else is known; it has a few seconds.
    """

    expired = threading.Event()

    def expire() -> None:
        expired.set()
        known: list[str] = []
        asking = threading.Thread(target=lambda: known.append(explain()), daemon=True)
        asking.start()
        asking.join(_EXPLAIN_S)
        why = f" ({known[0]})" if known and known[0] else ""
        text = message.format(seconds=f"{seconds:g} s{why}")
        print(f"error: {text}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        os._exit(1)

    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if expired.is_set():
            # A peer whose bound was over a moment earlier has gone, and the body has failed with
            # that. What is being said about the cause is what counts.
            timer.join()
