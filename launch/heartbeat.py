"""Who is alive: decides from the workers' heartbeats that the group has stalled, and who is behind.

A command that writes no heartbeats is not watched. As soon as one worker has written, all are
expected to, since they run the same command: the others get `start_timeout_s` from then for their
first one. The evaluator is never watched: it may wait for a checkpoint for hours.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class _Beat:
    at: float
    step: int | None


class Watch:
    """The heartbeats of one group. Times are seconds of any one monotonic clock."""

    def __init__(self, workers: Iterable[str], *, start_timeout_s: float, stall_timeout_s: float):
        self._expected = set(workers)
        self._start_timeout_s = start_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._beats: dict[str, _Beat] = {}
        self._first_at: float | None = None
        self.highest_step: int | None = None

    def beat(self, worker: str, content: str, now: float) -> None:
        """Notes a heartbeat; `content` is the step if it is a number."""
        if worker not in self._expected:
            return
        step = int(content) if content.isdecimal() else None
        self._beats[worker] = _Beat(now, step)
        if self._first_at is None:
            self._first_at = now
        if step is not None:
            self.highest_step = max(step, self.highest_step or 0)

    def end(self, worker: str) -> None:
        """Expects nothing more of a worker that has ended."""
        self._expected.discard(worker)

    def is_overdue(self, now: float) -> bool:
        """Whether some worker has been silent for too long."""
        if self._first_at is None:
            return False
        return any(
            now - self._beats[worker].at > self._stall_timeout_s
            if worker in self._beats
            else now - self._first_at > self._start_timeout_s
            for worker in self._expected
        )

    def behind(self, states: Mapping[str, str], now: float) -> tuple[str, str]:
        """Names the worker that the others most likely wait for, and why.

        A stopped process comes first, then the lowest step, then the longest silence.

        Args:
            states: process states from /proc; `T` or `t` is stopped.
        """
        assert self._first_at is not None, "nobody is overdue before somebody has written"

        def key(worker: str) -> tuple[bool, float, float, str]:
            beat = self._beats.get(worker, _Beat(float("-inf"), -1))
            step = float("inf") if beat.step is None else beat.step
            return (states.get(worker) not in ("T", "t"), step, beat.at, worker)

        worker = min(self._expected, key=key)
        beat = self._beats.get(worker)
        if beat is None:
            silence_s = now - self._first_at
            why = f"has written no heartbeat in the {silence_s:.0f} s since a peer's first one"
        else:
            why = f"has been silent for {now - beat.at:.0f} s"
            if beat.step is not None:
                why += f" at step {beat.step} (the furthest is {self.highest_step})"
        if states.get(worker) in ("T", "t"):
            why += "; its process is stopped (state T)"
        return worker, why
