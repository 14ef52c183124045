"""The relay: stands here for a guard on another machine, and speaks to the agent there over ssh.

    python -I -S relay.py LINK_TIMEOUT_S SSH...

To the launcher it is a guard: bytes on its standard input are signals for the worker, lines of text
on the same socket are news of it, the worker's output comes out of descriptors 1 and 2. Before
them it reads what the agent is to be sent, four bytes of length first. One more line of news:

    lost REASON...   the connection ended or fell silent before the worker's end was known

Bytes to the agent: 0 means "still here", others are signals. From the agent come a greeting (what
a login prints before it is dropped) and frames: a kind, four bytes of length, content. Each side
sends something every second. The launcher's end closes standard input, which closes the agent's,
which kills the worker's tree.
"""

import os
import select
import signal
import struct
import sys
import time

BEAT_S = 1.0
HEADER = struct.Struct("!cI")
STDOUT, STDERR, NEWS, BEAT, END = (bytes([kind]) for kind in b"12cbe")
HELLO = b"\0dist-launch\0"
# With so much not yet passed on, no more is read.
FULL = 1 << 20
# From the launcher's end on, to the agent's.
_LEAVE_S = 15.0
# More time than ssh takes to give up a connection.
_CONNECT_S = 15.0
_ATTEMPTS = 6
_TURNED_AWAY_S = 3.0


class Outlet:
    """A descriptor that takes what it can and never blocks."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor
        self.pending = b""
        os.set_blocking(descriptor, False)

    def write(self, data: bytes) -> None:
        """Passes data on, now or with later calls; to a reader that has gone, never."""
        self.pending += data
        try:
            while self.pending:
                self.pending = self.pending[os.write(self.descriptor, self.pending[:65536]) :]
        except BlockingIOError:
            return
        except OSError:
            self.pending = b""


class _Relay:
    def __init__(self, control: int, link_timeout_s: float, ssh: list[str]):
        self._control = control
        self._link_timeout_s = link_timeout_s
        self._streams = {STDOUT: Outlet(1), STDERR: Outlet(2)}
        self._is_known = False  # how the worker ended
        self._has_ended = False  # so says the agent
        self._has_heard = False
        self._is_left = False  # the launcher has gone
        self._to_send = self._read_payload()  # and early signals, at each attempt
        self._launcher = Outlet(control)
        self._command = ssh
        self._start()

    def _start(self) -> None:
        self._received = b""
        self._started_at = self._heard_at = time.monotonic()
        self._ssh, to_agent, self._from_agent = _start(self._command)
        self._agent = Outlet(to_agent)
        self._agent.write(self._to_send)

    def _read_payload(self) -> bytes:
        data, length = b"", 4
        while len(data) < length:
            chunk = os.read(self._control, length - len(data))
            if not chunk:
                sys.exit(0)
            data += chunk
            if length == 4 == len(data):
                length += int.from_bytes(data, "big")
        return data[4:]

    def run(self) -> None:
        reason = self._serve()
        for attempt in range(1, _ATTEMPTS):
            # A server with many at its door turns some away at once (MaxStartups).
            is_turned_away = time.monotonic() - self._started_at < _TURNED_AWAY_S
            if self._has_heard or self._is_left or not is_turned_away:
                break
            self._end_client()
            time.sleep(attempt * (0.2 + os.getpid() % 7 / 10))
            self._start()
            reason = self._serve()
        if reason and not self._is_known:
            self._tell(f"lost {reason}".encode())
        for outlet in (self._launcher, *self._streams.values()):
            os.set_blocking(outlet.descriptor, True)
            outlet.write(b"")
        self._end_client()

    def _end_client(self) -> None:
        os.close(self._from_agent)
        if not self._is_left:
            os.close(self._agent.descriptor)
        if not self._has_ended:  # it would wait for the other side
            os.kill(self._ssh, signal.SIGKILL)
        os.waitpid(self._ssh, 0)

    def _serve(self) -> str:
        """Passes on in both directions until the agent's end; returns what is wrong with it."""
        leave_at = float("inf")
        beat_at = 0.0
        while True:
            now = time.monotonic()
            if now >= leave_at:
                return "it does not end"
            if now >= beat_at and leave_at == float("inf"):
                self._agent.write(b"\0")
                beat_at = now + BEAT_S
            is_full = any(stream.pending for stream in self._streams.values())
            reads = [] if is_full else [self._from_agent]
            if leave_at == float("inf"):
                reads.append(self._control)
            every = (*self._streams.values(), self._agent, self._launcher)
            outlets = [outlet for outlet in every if outlet.pending]
            targets = [outlet.descriptor for outlet in outlets]
            ready, writable, _ = select.select(reads, targets, [], BEAT_S / 2)
            now = time.monotonic()
            if is_full or self._from_agent in ready:
                self._heard_at = now  # who does not listen must not complain
            elif now - self._heard_at > self._link_timeout_s + self._connect_s():
                return f"nothing came over the link for {self._link_timeout_s:g} s"
            for outlet in outlets:
                if outlet.descriptor in writable:
                    outlet.write(b"")
            if self._from_agent in ready:
                data = os.read(self._from_agent, 1 << 16)
                if not data:
                    return self._why_ended()
                self._received += data
                if not self._has_heard:
                    _, hello, rest = self._received.partition(HELLO)
                    self._has_heard = bool(hello)
                    self._received = rest if hello else self._received[-len(HELLO) :]
                if self._has_heard:
                    self._take()
            if self._control in ready:
                signals = _read(self._control)
                self._agent.write(signals)
                if not self._has_heard:
                    self._to_send += signals
                if not signals:
                    self._is_left = True
                    leave_at = now + _LEAVE_S
                    os.close(self._agent.descriptor)
                    self._agent.pending = b""

    def _connect_s(self) -> float:
        return 0.0 if self._has_heard else _CONNECT_S

    def _why_ended(self) -> str:
        if self._has_ended:
            return ""
        return "the connection ended" if self._has_heard else "there was no connection"

    def _take(self) -> None:
        start = 0
        while len(self._received) >= start + HEADER.size:
            kind, length = HEADER.unpack_from(self._received, start)
            end = start + HEADER.size + length
            if len(self._received) < end:
                break
            content = self._received[start + HEADER.size : end]
            start = end
            if kind in self._streams:
                self._streams[kind].write(content)
            elif kind == NEWS:
                self._is_known |= content.startswith((b"exit ", b"unrunnable "))
                self._tell(content)
            elif kind == END:
                self._has_ended = True
        self._received = self._received[start:]

    def _tell(self, line: bytes) -> None:
        """Tells the launcher; one that is stopped (Ctrl-Z) finds the newest of beats in a row."""
        # What has no line before it may be half sent: it stays.
        before, newline, last = self._launcher.pending[:-1].rpartition(b"\n")
        if newline and last.startswith(b"beat ") and line.startswith(b"beat "):
            self._launcher.pending = before + newline
        self._launcher.write(line + b"\n")


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 64)
    except OSError:
        return b""


def _start(ssh: list[str]) -> tuple[int, int, int]:
    """Starts the client; its process id, and the pipes to its input and from its output."""
    its_input, to_it = os.pipe()
    from_it, its_output = os.pipe()
    actions = [(os.POSIX_SPAWN_DUP2, its_input, 0), (os.POSIX_SPAWN_DUP2, its_output, 1)]
    pid = os.posix_spawnp(ssh[0], ssh, os.environ, file_actions=actions, setsigdef=[signal.SIGPIPE])
    os.close(its_input)
    os.close(its_output)
    return pid, to_it, from_it


def main() -> None:
    """Relays until the agent has ended."""
    link_timeout_s, ssh = float(sys.argv[1]), sys.argv[2:]
    control = os.dup(0)  # not inheritable, unlike 0
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    _Relay(control, link_timeout_s, ssh).run()


if __name__ == "__main__":
    main()
