"""Runs one group of workers from start to end: all of them end, one way or the other."""

import errno
import selectors
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from launch.heartbeat import Watch
from launch.job import Task
from launch.output import Capture, Output
from launch.process import Process, kill_orphans
from launch.report import LOST, Ended, Ending
from launch.stop import StopRequests

_TICK_S = 0.5
_BUSY_TICK_S = 0.02
# Peers of a dead worker fail within about a second, so that is how long to wait for the one that
# explains the first ones seen.
_SETTLE_S = 1.5
# Python's stacks are in the output well within this time of SIGQUIT, on a loaded machine too.
_DUMP_S = 1.0
# A guard that is alive reports the end of its tree much sooner after SIGKILL.
_GIVE_UP_S = 15.0


@dataclass(frozen=True)
class Limits:
    """Bounds in seconds, as the flags of the same names have them."""

    start_timeout_s: float
    stall_timeout_s: float
    grace_period_s: float


class _Member:
    """A task, and what is known of its process."""

    def __init__(self, task: Task):
        self.task = task
        self.process: Process | None = None  # None: it did not start, or nothing of it is left
        self.capture: Capture | None = None
        self.pid = 0
        self.state = "R"
        self.end: Ended | None = None
        self.stall = ""

    @property
    def is_worker(self) -> bool:
        return self.task.slot is not None

    @property
    def ended(self) -> Ended:
        """Its end, with what became known later."""
        assert self.end is not None
        tail = self.capture.tail if self.capture else b""
        return replace(self.end, tail=tail, stall=self.stall)


class Group:
    """One start of a group. Use it once: `Group(...).run()`."""

    def __init__(
        self,
        tasks: Sequence[Task],
        environ: Mapping[str, str],
        limits: Limits,
        output: Output,
        requests: StopRequests,
    ):
        self._members = [_Member(task) for task in tasks]
        self._environ = environ
        self._limits = limits
        self._output = output
        self._requests = requests
        self._selector = selectors.DefaultSelector()
        self._watch = Watch(
            [task.name for task in tasks if task.slot is not None],
            start_timeout_s=limits.start_timeout_s,
            stall_timeout_s=limits.stall_timeout_s,
        )
        self._settle_at: float | None = None
        self._dump_at: float | None = None
        self._is_interrupted = False  # by Ctrl-C
        self._stopping = False
        self._killing = ""  # why all are killed; empty: they are not
        self._kill_at = float("inf")
        self._give_up_at = float("inf")
        self._evaluator_deadline = float("inf")

    def run(self) -> Ending:
        """Starts the group and returns when no process of it is left."""
        self._started_at = time.monotonic()
        with self._selector:
            self._selector.register(self._requests, selectors.EVENT_READ, self._on_request)
            for member in self._members:
                self._start(member)
            while any(member.process for member in self._members):
                busy = self._settle_at is not None and not self._stopping
                for key, _ in self._selector.select(_BUSY_TICK_S if busy else _TICK_S):
                    key.data()
                self._tick(time.monotonic())
        kill_orphans()
        self._output.drain()  # for the last lines, on which the verdict rests
        ended = tuple(member.ended for member in self._members)
        return Ending(ended, time.monotonic() - self._started_at, self._watch.highest_step)

    def _start(self, member: _Member) -> None:
        task = member.task
        try:
            process = Process(task, self._environ)
        except OSError as error:
            self._on_end(member, code=126, unrunnable=error.errno or 0)
            return
        member.process = process
        member.capture = self._output.add(task.name, process.pipes, task.remote_address)
        self._selector.register(
            process, selectors.EVENT_READ, lambda: self._on_messages(member, process)
        )

    def _on_request(self) -> None:
        for number in self._requests.take():
            is_interrupt = number == signal.SIGINT
            if is_interrupt and self._is_interrupted:
                self._kill("Ctrl-C came again")
                continue
            self._is_interrupted |= is_interrupt
            if self._stopping:  # workers take a second signal for an order to leave unsaved
                if is_interrupt:
                    self._output.say(
                        "SIGINT: the workers are stopping already; Ctrl-C again kills them at once"
                    )
                continue
            self._output.say(
                f"{signal.Signals(number).name}: the workers are asked to stop and have"
                f" {self._limits.grace_period_s:g} s; a second Ctrl-C kills them at once"
            )
            # Many a command saves on SIGTERM and on Ctrl-C, and simply dies of the others.
            self._stop(number if is_interrupt else signal.SIGTERM)

    def _on_messages(self, member: _Member, process: Process) -> None:
        messages = process.receive()
        if messages is None:
            self._selector.unregister(process)
            process.close()
            member.process = None
            self._on_end(member, code=-signal.SIGKILL, orphaned=True)
            return
        for kind, *words in messages:
            if kind == "pid":
                member.pid = int(words[0])
            elif kind == "state":
                member.state = words[0]
            elif kind == "beat":
                self._watch.beat(member.task.name, " ".join(words), time.monotonic())
            elif kind == "exit":
                self._on_end(member, code=int(words[0]), oom=words[1] == "oom")
            elif kind == "unrunnable":
                number = int(words[0])
                code = 127 if number == errno.ENOENT else 126
                self._on_end(member, code=code, unrunnable=number)
            elif kind == "lost":
                self._on_end(member, code=LOST, lost=" ".join(words))

    def _on_end(
        self,
        member: _Member,
        *,
        code: int,
        oom: bool = False,
        unrunnable: int = 0,
        orphaned: bool = False,
        lost: str = "",
    ) -> None:
        if member.end is not None:  # the first message about its end is the one that says most
            return
        now = time.monotonic()
        member.end = Ended(
            name=member.task.name,
            slot=member.task.slot,
            pid=member.pid,
            code=code,
            at_s=now - self._started_at,
            asked=self._stopping,
            killed=self._killing,
            oom=oom and not self._killing,
            unrunnable=unrunnable,
            orphaned=orphaned,
            host=member.task.remote_address,
            lost=lost,
        )
        self._watch.end(member.task.name)
        if self._stopping:
            return
        if not member.is_worker:
            if member.end.failed:
                self._output.say(f"the training goes on without its evaluator: {member.end}")
        elif code != 0 and self._settle_at is None:
            self._settle_at = now + _SETTLE_S
        elif not self._running_workers():
            self._evaluator_deadline = now + self._limits.stall_timeout_s

    def _running_workers(self) -> list[_Member]:
        return [member for member in self._members if member.is_worker and member.end is None]

    def _tick(self, now: float) -> None:
        """Does what is due."""
        if now >= self._give_up_at:
            for member in self._members:
                if member.process:
                    member.process.kill_guard()
        elif now >= self._kill_at:
            self._kill("it did not stop in time")
        elif self._stopping:
            return
        elif self._dump_at is not None:
            if now >= self._dump_at:
                self._dump_at = None
                if self._watch.is_overdue(now):  # still
                    self._name_stalled(now)
                    self._stop(signal.SIGTERM)
        elif self._settle_at is not None:
            if now >= self._settle_at or self._is_settled():
                self._stop(signal.SIGTERM)
        elif self._watch.is_overdue(now):
            self._output.say("the group has stalled; the stacks of the workers:")
            self._send(signal.SIGQUIT)
            self._dump_at = now + _DUMP_S
        elif now >= self._evaluator_deadline:
            self._output.say("the evaluator does not end, though the training has")
            self._stop(signal.SIGTERM)

    def _is_settled(self) -> bool:
        """Whether a failure is there that no other one can explain, or no worker is left."""
        if not self._running_workers():
            return True
        for member in self._members:
            if not member.is_worker or member.end is None or not member.ended.failed:
                continue
            if member.end.code < 0 and not member.ended.lost_a_peer:
                return True
            said_all = member.capture is None or member.capture.closed.is_set()
            if said_all and not member.ended.lost_a_peer:
                return True
        return False

    def _name_stalled(self, now: float) -> None:
        states = {member.task.name: member.state for member in self._members}
        worker, why = self._watch.behind(states, now)
        for member in self._members:
            if member.task.name == worker:
                member.stall = why

    def _stop(self, number: int) -> None:
        if not self._stopping:
            self._stopping = True
            self._kill_at = time.monotonic() + self._limits.grace_period_s
        self._send(number)

    def _kill(self, why: str) -> None:
        self._stopping, self._killing = True, why
        self._kill_at = float("inf")
        self._give_up_at = time.monotonic() + _GIVE_UP_S
        self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        for member in self._members:
            if member.process:
                member.process.send(number)
