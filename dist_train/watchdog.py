"""Watchdog: an upper bound for what cannot be interrupted, a wait inside TensorFlow's C++."""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

_EXPLAIN_S = 10.0
# A process that ends for what became of others stays for their sake: they hear from it, and ask it,
# a moment later.
LINGER_S = 1.0


@contextlib.contextmanager
def bound(
    seconds: float, message: str, *, explain: Callable[[], str] = lambda: ""
) -> Iterator[None]:
    """Ends the process with status 1 if the body takes longer.

    A thread that hangs in a collective cannot be stopped from Python, so the process goes: the
    stacks and the message are printed, and what was saved stays.

    Args:
      seconds: the bound.
      message: what was waited for and what to do about it; `{seconds}` is filled in.
      explain: asked at the end for what else is known; it has a few seconds.
    """
    wait = _Wait(seconds, message, explain)
    try:
        _watch.add(wait)
        yield
    finally:
        _watch.remove(wait)
        if wait.has_expired:
            # A peer whose bound was over a moment earlier has gone, and the body has failed with
            # that. What is being said about the cause is what counts, and then the process ends.
            threading.Event().wait()


class _Wait:
    """A body that runs."""

    def __init__(self, seconds: float, message: str, explain: Callable[[], str]):
        self.deadline = time.monotonic() + seconds
        self.has_expired = False
        self._seconds = seconds
        self._message = message
        self._explain = explain

    def end(self) -> None:
        """Ends the process."""
        known: list[str] = []
        asking = threading.Thread(target=lambda: known.append(self._explain()), daemon=True)
        asking.start()
        asking.join(_EXPLAIN_S)
        why = f" ({known[0]})" if known and known[0] else ""
        text = self._message.format(seconds=f"{self._seconds:g} s{why}")
        try:
            # The message last: some fifty lines of stacks would scroll it away.
            faulthandler.dump_traceback(file=2, all_threads=True)
            print(f"error: {text}", file=sys.stderr, flush=True)
            if why:
                time.sleep(LINGER_S)
        finally:
            os._exit(1)


class _Watch:
    """One thread for all waits: one for each would cost every call of the loop 0.3 ms."""

    def __init__(self) -> None:
        self._waits: list[_Wait] = []
        self._changed = threading.Condition()
        self._wakes_at = 0.0
        self._thread: threading.Thread | None = None

    def add(self, wait: _Wait) -> None:
        with self._changed:
            self._waits.append(wait)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
                self._thread.start()
            elif wait.deadline < self._wakes_at:
                self._changed.notify()

    def remove(self, wait: _Wait) -> None:
        # No lock: at Python's end the thread is frozen, and may hold it.
        with contextlib.suppress(ValueError):  # Ctrl-C came before it was added
            self._waits.remove(wait)

    def _run(self) -> None:
        self._next().end()

    def _next(self) -> _Wait:
        """The first wait that expires."""
        with self._changed:
            while True:
                first = min(tuple(self._waits), key=lambda wait: wait.deadline, default=None)
                self._wakes_at = float("inf") if first is None else first.deadline
                left = self._wakes_at - time.monotonic()
                if first is not None and left <= 0:
                    first.has_expired = True
                    return first
                self._changed.wait(min(left, threading.TIMEOUT_MAX))


_watch = _Watch()
