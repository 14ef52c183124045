"""Runs the launcher as a user does, and looks into /proc for what it leaves behind."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

_TEST_TIMEOUT_S = 60
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Result:
    """What a finished launcher has left on paper."""

    status: int
    out: bytes
    err: str
    seconds: float


class Launcher:
    """Starts launchers whose processes carry a mark in their environment."""

    def __init__(self, directory: Path):
        self._mark = f"DIST_LAUNCH_TEST={uuid.uuid4().hex}"
        self._directory = directory
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, *arguments: str, **options) -> subprocess.Popen[bytes]:
        """Starts `dist-launch ARGUMENTS` in a directory of its own; options go to Popen."""
        name, _, value = self._mark.partition("=")
        env = {**os.environ, "PYTHONPATH": str(ROOT), name: value, **options.pop("env", {})}
        env = {name: value for name, value in env.items() if value is not None}
        process = subprocess.Popen(
            [sys.executable, "-m", "launch", *arguments],
            cwd=self._directory,
            env=env,
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
        )
        self._started.append(process)
        return process

    def finish(self, process: subprocess.Popen[bytes], timeout_s: float = 20) -> Result:
        """Waits for a started launcher and reads what it has written."""
        begin = time.monotonic()
        out, err = process.communicate(timeout=timeout_s)
        seconds = time.monotonic() - begin
        return Result(process.returncode, out, (err or b"").decode(errors="replace"), seconds)

    def run(self, *arguments: str, timeout_s: float = 20, **options) -> Result:
        """Starts one and waits for it."""
        return self.finish(self.start(*arguments, **options), timeout_s)

    def alive(self) -> dict[int, str]:
        """Process id -> command of every living process that any of these launchers started.

        Zombies do not live; a process that has just been killed may be one for a second.
        """
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                if self._mark.encode() not in (entry / "environ").read_bytes().split(b"\0"):
                    continue
                state = (entry / "stat").read_bytes().rpartition(b")")[2].split()[0]
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if state not in (b"Z", b"X"):
                found[int(entry.name)] = command
        return found

    def end(self) -> dict[int, str]:
        """Returns what is alive though no launcher runs, and kills it."""
        for process in self._started:
            if process.poll() is None:
                process.kill()
            process.communicate(timeout=10)
        left = wait_until(lambda: not self.alive(), 1.0) or self.alive()
        if left is True:
            return {}
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        return left


def wait_until(holds: Callable[[], object], timeout_s: float = 10.0) -> bool:
    """Looks every 10 ms; returns whether it came to hold in time."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


# A kernel that gives a process the lowest port from 20000 on that it has not bound yet.
_LOWEST_PORTS = """
import socket
real, bound = socket.socket.bind, []

def bind(self, address):
    if address != ("", 0):
        return real(self, address)
    taken = [sock.getsockname()[1] for sock in bound if sock.fileno() >= 0]
    for port in range(20000, 30000):
        if port not in taken:
            try:
                real(self, ("", port))
            except OSError:
                continue
            bound.append(self)
            return

socket.socket.bind = bind
"""


@pytest.fixture
def lowest_ports(tmp_path: Path) -> Path:
    """A sitecustomize.py with which the lowest ports from 20000 on are the free ones."""
    path = tmp_path / "sitecustomize.py"
    path.write_text(_LOWEST_PORTS)
    return path


@pytest.fixture
def restarted_twice() -> tuple[Sequence[str], Callable[[Result], list[str]]]:
    """A worker command, and fn(result) -> the addresses of all its starts, one after another."""
    script = """
[ $DIST_LAUNCH_INDEX = 0 ] || exit 0
echo $TF_CONFIG
[ $DIST_LAUNCH_RESTART = 2 ]
"""

    def read(result: Result) -> list[str]:
        configs = [json.loads(line.partition(b"] ")[2]) for line in result.out.splitlines()]
        return [address for config in configs for address in config["cluster"]["worker"]]

    return ["--max_restarts=2", "--", "sh", "-c", script], read


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    """A launcher, and after every test the proof that no process of it is left."""
    launcher = Launcher(tmp_path)
    before = signal.signal(signal.SIGALRM, _fail)
    signal.alarm(_TEST_TIMEOUT_S)
    try:
        yield launcher
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        left = launcher.end()
    assert left == {}


def _fail(*_) -> None:
    raise TimeoutError(f"the test takes more than {_TEST_TIMEOUT_S} s")


@pytest.fixture
def eventually() -> Callable[..., None]:
    """Asserts that something comes to hold within a bound."""

    def check(holds: Callable[[], object], timeout_s: float = 10.0) -> None:
        assert wait_until(holds, timeout_s)

    return check


@pytest.fixture
def python() -> Callable[..., Sequence[str]]:
    """A worker command that runs Python source, with `INDEX` defined."""

    def command(source: str) -> Sequence[str]:
        head = "import os, signal, sys, time\nINDEX = int(os.environ['DIST_LAUNCH_INDEX'])\n"
        return ["--", sys.executable, "-S", "-E", "-c", head + source]

    return command
