"""The workers' output: whole lines with a prefix on our own, raw bytes in log files."""

import os
import select
import selectors
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

_READ_BYTES = 1 << 18
# A longer line is shown in pieces, so that a worker which never ends a line costs no memory.
_LINE_BYTES = 1 << 16
# How much of a worker's last output is kept for the report.
_TAIL_BYTES = 1 << 14
# How often the state of a progress bar that never ends its line is shown.
_BAR_INTERVAL_S = 10.0
# A reader that takes nothing for this long does not keep the launcher from leaving.
_STUCK_S = 3.0
_COLOURS = (36, 33, 32, 35, 34, 96, 93, 92, 95, 94)


class Prefixer:
    """Turns pieces of a stream into whole lines with a prefix.

    A carriage return means that what is before it in the line has been overwritten, as progress
    bars do: only the last state is shown, when the line ends or every 10 s.
    """

    def __init__(self, prefix: bytes, clock: Callable[[], float] = time.monotonic):
        self._prefix = prefix
        self._clock = clock
        self._pending = b""
        self._shown_at = clock()

    def feed(self, chunk: bytes) -> bytes:
        """Returns what is to be shown now: nothing, or whole lines."""
        end = chunk.rfind(b"\n") + 1
        shown = b""
        if end:
            shown = self._prefixed(self._pending + chunk[:end])
            self._pending = chunk[end:]
        else:
            self._pending += chunk
        if b"\r" in self._pending[:-1]:
            self._pending = _last_state(self._pending)
            if not shown and self._clock() - self._shown_at >= _BAR_INTERVAL_S:
                shown = self._prefixed(self._pending + b"\n")
        while len(self._pending) > _LINE_BYTES:
            shown += self._prefixed(self._pending[:_LINE_BYTES] + b"\n")
            self._pending = self._pending[_LINE_BYTES:]
        if shown:
            self._shown_at = self._clock()
        return shown

    def finish(self) -> bytes:
        """Returns the last line, if its end is missing."""
        pending, self._pending = self._pending, b""
        return self._prefixed(pending + b"\n") if pending else b""

    def _prefixed(self, lines: bytes) -> bytes:
        # One replace for a whole chunk: a Python loop over lines manages a tenth of the bytes.
        if b"\r" in lines:
            lines = b"\n".join(_last_state(line).rstrip(b"\r") for line in lines.split(b"\n"))
        return self._prefix + lines[:-1].replace(b"\n", b"\n" + self._prefix) + b"\n"


def _last_state(line: bytes) -> bytes:
    """What a terminal would still show of it; a carriage return at the very end is kept."""
    return line[line.rstrip(b"\r").rfind(b"\r") + 1 :]


@dataclass
class Capture:
    """What has come from one worker.

    Attributes:
        tail: the last 16 KiB of its standard output and error.
        closed: set when both have ended.
    """

    log: int | None = None
    tail: bytes = b""
    open_streams: int = 0
    closed: threading.Event = field(default_factory=threading.Event)


@dataclass
class _Stream:
    source: int
    target: int
    prefixer: Prefixer | None  # None: not shown
    capture: Capture


class Output(threading.Thread):
    """The one reader of all workers and the one writer to our standard output and error.

    A thread of its own: when the terminal is stopped or `less` waits for a key, a write blocks,
    and the launcher must go on to watch and stop its workers. All its methods return at once,
    except `drain`.
    """

    def __init__(self, *, shows: Callable[[str], bool], log_dir: str | None):
        """Does not start the thread yet.

        Args:
            shows: from a worker's name whether its output is shown.
            log_dir: an existing folder for the log files; None: there are none.
        """
        super().__init__(name="output", daemon=True)
        self._shows = shows
        self._log_dir = log_dir
        self._selector = selectors.DefaultSelector()
        self._requests: deque[Callable[[], None]] = deque()
        self._wake, self._wake_in = os.pipe()
        os.set_blocking(self._wake_in, False)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._colours = {fd: _wants_colour(fd) for fd in (1, 2)}
        self._broken: set[int] = set()
        self._waiting: list[threading.Event] = []
        self._is_stuck = False
        self._written = 0

    def add(self, name: str, sources: dict[int, int], host: str = "") -> Capture:
        """Takes over a worker's output.

        Args:
            name: such as `worker 1`; makes the prefix and the log file's name.
            sources: pipe to read and close -> our file descriptor (1 or 2) to show it on.
            host: goes into the prefix too.
        """
        capture = Capture(open_streams=len(sources), log=self._open_log(name))

        def register() -> None:
            for source, target in sources.items():
                prefixer = Prefixer(self._prefix(name, target, host)) if self._shows(name) else None
                stream = _Stream(source, target, prefixer, capture)
                self._selector.register(source, selectors.EVENT_READ, stream)

        self._request(register)
        return capture

    def _open_log(self, name: str) -> int | None:
        if self._log_dir is None:
            return None
        path = os.path.join(self._log_dir, name.replace(" ", "-") + ".log")
        try:
            return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError as error:
            self.say(f"no log file: {path}: {error.strerror}")
            return None

    def say(self, text: str) -> None:
        """Shows lines of our own on standard error."""
        lines = Prefixer(self._prefix("launch", 2)).feed(text.encode(errors="replace") + b"\n")
        self._request(lambda: self._show(2, lines))

    def drain(self) -> None:
        """Waits until all that ended workers have printed, and all that was said, is written.

        A reader that has stopped reading is waited for only once.
        """
        drained = threading.Event()
        self._request(lambda: self._waiting.append(drained))
        while not self._is_stuck:
            written = self._written
            if drained.wait(_STUCK_S):
                return
            self._is_stuck = written == self._written

    def _request(self, action: Callable[[], None]) -> None:
        self._requests.append(action)
        try:
            os.write(self._wake_in, b".")
        except BlockingIOError:
            return  # a full pipe wakes as well

    def run(self) -> None:
        """The thread's loop; it ends with the process."""
        while True:
            for key, _ in self._selector.select():
                if key.data is None:
                    os.read(self._wake, 4096)
                else:
                    self._pass_on(key.data)
            while self._requests:
                self._requests.popleft()()
            while self._waiting and len(self._selector.get_map()) == 1:  # our own wake-up pipe
                self._waiting.pop().set()

    def _pass_on(self, stream: _Stream) -> None:
        chunk = os.read(stream.source, _READ_BYTES)
        capture = stream.capture
        if not chunk:
            if stream.prefixer:
                self._show(stream.target, stream.prefixer.finish())
            self._close(stream)
            return
        if len(chunk) >= _TAIL_BYTES:
            capture.tail = chunk[-_TAIL_BYTES:]
        else:
            capture.tail = (capture.tail + chunk)[-_TAIL_BYTES:]
        if capture.log is not None:
            try:
                _write_all(capture.log, chunk)
            except OSError as error:  # a full disk is no reason to stop a training
                os.close(capture.log)
                capture.log = None
                self.say(f"a log file is cut short: {error.strerror}")
        if stream.prefixer:
            self._show(stream.target, stream.prefixer.feed(chunk))

    def _close(self, stream: _Stream) -> None:
        self._selector.unregister(stream.source)
        os.close(stream.source)
        stream.capture.open_streams -= 1
        if stream.capture.open_streams == 0:
            if stream.capture.log is not None:
                os.close(stream.capture.log)
            stream.capture.closed.set()

    def _show(self, target: int, lines: bytes) -> None:
        if target in self._broken:
            return
        try:
            _write_all(target, lines)
            self._written += len(lines)
        except OSError:  # `| head` has left; the training and its log files go on
            self._broken.add(target)

    def _prefix(self, name: str, target: int, host: str = "") -> bytes:
        label = f"{name} {host}" if host else name
        if not self._colours[target]:
            return f"[{label}] ".encode()
        number = int(name.split()[-1]) if name[-1].isdigit() else 0
        colour = 1 if name == "launch" else _COLOURS[number % len(_COLOURS)]
        return f"\x1b[{colour}m[{label}]\x1b[0m ".encode()


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:  # whoever else has this terminal open made it non-blocking
            select.select([], [fd], [])


def _wants_colour(fd: int) -> bool:
    # https://no-color.org
    return os.isatty(fd) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
