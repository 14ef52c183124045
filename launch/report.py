"""Says why a group ended: which worker failed first, and what followed from it.

TensorFlow lets the peers of a dead worker fail within about a second, and louder than the dead one.
"""

import os
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass

STOPPED = 75  # EX_TEMPFAIL: saved and stopped on request, start again
LOST = 255  # ssh's own, for a worker of which nothing more is known
_ON_REQUEST = (STOPPED, 128 + signal.SIGTERM, -signal.SIGTERM)
_ON_INTERRUPT = (128 + signal.SIGINT, -signal.SIGINT)
_LAST_LINES = 12
# What TensorFlow, and a rendezvous that waits in vain, say of a peer that has gone.
_LOST_PEER = re.compile(
    rb"Socket closed|unhealthy|UnavailableError|CoordinationService|coordination service"
    rb"|Connection reset by peer|Connection refused|stopped sending heartbeats|never arrived"
)
_PORT_TAKEN = re.compile(rb"Could not start gRPC server|Address already in use")


@dataclass(frozen=True)
class Ended:
    """How one worker ended.

    Attributes:
        name: `worker 1` or `evaluator`.
        slot: its place; None for the evaluator.
        pid: its process id; 0: it never ran.
        code: exit status, or minus the signal that killed it.
        at_s: seconds since the group's start.
        asked: it had been asked to stop before.
        killed: why the launcher had sent SIGKILL before; empty: it had not.
        oom: the kernel says that it killed it for want of memory.
        tail: its last output.
        stall: why it counts as stalled; empty: it does not.
        unrunnable: errno of the attempt to execute it; 0: it ran.
        orphaned: its guard had gone, so how it ended is not known.
        host: the other machine that it ran on; empty: this one.
        lost: why nothing more is known of it; empty: it is known.
    """

    name: str
    slot: int | None
    pid: int
    code: int
    at_s: float
    asked: bool = False
    killed: str = ""
    oom: bool = False
    tail: bytes = b""
    stall: str = ""
    unrunnable: int = 0
    orphaned: bool = False
    host: str = ""
    lost: str = ""

    @property
    def on_request(self) -> bool:
        """Whether it ended because somebody asked it to, and not by an error of its own."""
        return self.code in _ON_REQUEST or (self.asked and self.code in _ON_INTERRUPT)

    @property
    def failed(self) -> bool:
        """Whether it ended as it should not have."""
        if self.slot is None and self.asked:
            return False  # an evaluator that did not end after the training had
        return bool(self.stall) or not (self.code == 0 or self.on_request)

    @property
    def lost_a_peer(self) -> bool:
        """Whether it ended with the error that a peer's end causes."""
        by_itself = (self.code > 0 or self.code == -signal.SIGABRT) and not self.lost
        return by_itself and bool(_LOST_PEER.search(self.tail))

    @property
    def port_taken(self) -> bool:
        """Whether it ended because somebody else had its port."""
        return self.code > 0 and not self.lost and bool(_PORT_TAKEN.search(self.tail))

    @property
    def exit_status(self) -> int:
        """The same as the exit status of a shell."""
        if self.stall:
            return 1
        return self.code if self.code >= 0 else 128 - self.code

    def __str__(self) -> str:
        on = f" on {self.host}" if self.host else ""
        if self.unrunnable:
            return f"{self.name}{on} could not be run: {os.strerror(self.unrunnable)}"
        if self.lost:
            return f"{self.name} was lost with {self.host}: {self.lost}"
        if self.stall:
            how = self.stall
        elif self.orphaned:
            how = "died with its guard, which was killed"
        elif self.oom:
            how = "killed by SIGKILL: out of memory, says the kernel"
        elif self.code < 0:
            how = f"killed by {_signal_name(-self.code)}"
            how += f" from the launcher, as {self.killed}" if self.killed else ""
        else:
            how = f"exit status {self.code}"
        return f"{self.name} (pid {self.pid}{on}): {how}"


@dataclass(frozen=True)
class Ending:
    """How a group ended.

    Attributes:
        ended: one for each worker, in the order of the tasks.
        lasted_s: seconds from the start to the end of the last.
        highest_step: the furthest step that a heartbeat told of; None: nobody did.
    """

    ended: tuple[Ended, ...]
    lasted_s: float
    highest_step: int | None


def first_failure(ended: Sequence[Ended]) -> Ended | None:
    """The failure that explains the others; None if nobody failed.

    That is the first one in time, except that an error of its own goes before the loss of a peer
    (a failing worker may take longer to leave than its peers take to notice), and both before what
    the launcher has killed.
    """
    failures = [end for end in ended if end.failed]

    def key(end: Ended) -> tuple[bool | float, ...]:
        is_evaluator = end.slot is None
        return (is_evaluator, not end.stall, bool(end.killed), end.lost_a_peer, end.asked, end.at_s)

    return min(failures, key=key, default=None)


def exit_status(ended: Sequence[Ended]) -> int:
    """The group's: the first failure's, else 75 if somebody was stopped on request, else 0."""
    first = first_failure(ended)
    if first is not None:
        return first.exit_status
    return STOPPED if any(end.on_request for end in ended if end.slot is not None) else 0


def describe(ended: Sequence[Ended]) -> str:
    """The report on a group that failed or was stopped: some lines of text."""
    first = first_failure(ended)
    if first is None:
        return "stopped on request: " + _listing([(end.name, _outcome(end)) for end in ended])
    lines = [f"first failure, {first.at_s:.1f} s after the start: {first}"]
    if last := _last_lines(first.tail):
        lines += ["its last lines:", *(f"  | {line}" for line in last)]
    before, after = [], []
    for end in ended:
        if end is first:
            continue
        if end.at_s <= first.at_s and not end.failed:
            before.append((end.name, _outcome(end)))
        elif not end.asked and not end.lost_a_peer and end.failed:
            before.append((end.name, f"failed as well ({_outcome(end)})"))
        else:
            after.append((end.name, _outcome(end)))
    if before:
        lines.append("besides: " + _listing(before))
    if after:
        lines.append("consequences: " + _listing(after))
    return "\n".join(lines)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # most real-time signals have none
        return f"signal {number}"


def _outcome(end: Ended) -> str:
    if end.code == 0:
        return "exit status 0"
    text = str(end).partition(": ")[2]
    if end.lost_a_peer:
        return f"lost a peer, {text}"
    return f"stopped on request, {text}" if end.on_request else text


def _listing(outcomes: Sequence[tuple[str, str]]) -> str:
    """Names with equal outcomes together: `worker 0, worker 2: exit status 1; …`."""
    names: dict[str, list[str]] = {}
    for name, outcome in outcomes:
        names.setdefault(outcome, []).append(name)
    return "; ".join(f"{', '.join(group)}: {outcome}" for outcome, group in names.items())


def _last_lines(tail: bytes) -> list[str]:
    text = tail.decode(errors="replace").replace("\r\n", "\n")
    lines = [line.rpartition("\r")[2].rstrip()[:500] for line in text.split("\n")]
    return [line for line in lines if line][-_LAST_LINES:]
