"""One worker process under its guard, here or on another machine."""

import fcntl
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from launch import guard, relay, remote
from launch.job import Login, Task

_GUARD = str(Path(guard.__file__).resolve())
_RELAY = str(Path(relay.__file__).resolve())


def _widen(pipe: int) -> None:
    """A worker that writes much should not wait for us at every 64 KiB."""
    try:
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 1 << 20)
    except OSError:  # beyond the user's allowance for pipes: slower, but right
        return


def adopt_orphans() -> None:
    """Makes this process inherit what a killed guard leaves behind."""
    guard.adopt_orphans()


def kill_orphans() -> None:
    """Kills what killed guards have left behind; only when no worker runs."""
    guard.kill_tree()


def _guard(task: Task) -> list[str]:
    return [_GUARD, ",".join(map(str, task.place.cpus)), *task.command]


def _relay(login: Login) -> list[str]:
    return [_RELAY, str(login.link_timeout_s), *remote.command(login)]


class Process:
    """A started worker.

    Attributes:
        pipes: the worker's output: pipe to read -> the worker's descriptor for it, 1 or 2.
    """

    def __init__(self, task: Task, environ: Mapping[str, str]):
        """Starts it.

        Args:
            environ: the variables that `task.env` comes on top of.

        Raises:
            OSError: no process, or no file descriptor, is to be had.
        """
        self.pipes: dict[int, int] = {}
        self._received = b""
        self._socket, guard_side = socket.socketpair()
        ends: list[int] = []
        try:
            for descriptor in (1, 2):
                source, end = os.pipe()
                ends.append(end)
                self.pipes[source] = descriptor
                _widen(end)
            # The guard is not in our session: neither Ctrl-C nor a kill of our group reaches it.
            login = task.host.login
            self._guard = subprocess.Popen(
                [sys.executable, "-I", "-S", *(_relay(login) if login else _guard(task))],
                stdin=guard_side.fileno(),
                stdout=ends[0],
                stderr=ends[1],
                cwd=None if login else task.directory,
                env=None if login else {**environ, **task.env},
                start_new_session=True,
            )
        except OSError:
            for source in self.pipes:
                os.close(source)
            self._socket.close()
            raise
        finally:
            guard_side.close()
            for end in ends:
                os.close(end)
        if login:
            self._hand_over(remote.worker_payload(task, environ, login.link_timeout_s))

    def _hand_over(self, payload: bytes) -> None:
        """Gives the relay what it is to send to the other machine."""
        try:
            self._socket.sendall(len(payload).to_bytes(4, "big") + payload)
        except OSError:
            return  # it has gone, which the next `receive` finds out

    def fileno(self) -> int:
        """Readable when the guard has something to say, or has gone."""
        return self._socket.fileno()

    def receive(self) -> list[list[str]] | None:
        """Reads what the guard says (see `launch.guard`, `launch.relay`), in words.

        Returns:
            The messages; None: the guard has gone, and with it every process of the worker.
        """
        try:
            data = self._socket.recv(4096)
        except ConnectionResetError:  # it went without reading our last signal
            data = b""
        if not data:
            return None
        *lines, self._received = (self._received + data).split(b"\n")
        return [line.decode(errors="replace").split() for line in lines]

    def send(self, number: int) -> None:
        """Asks the guard to pass a signal on; SIGKILL goes to the worker's whole tree."""
        try:
            self._socket.send(bytes([number]))
        except OSError:
            return  # it has gone, which the next `receive` finds out

    def close(self) -> None:
        """Lets go of a process whose guard has gone."""
        self._socket.close()
        self._guard.wait()

    def kill_guard(self) -> None:
        """The last resort: the worker dies of its parent-death signal."""
        self._guard.send_signal(signal.SIGKILL)


class Connection:
    """An ssh client with an agent at its other end that answers lines of JSON.

    Attributes:
        stdin, stdout: of the client, not blocking.
    """

    def __init__(self, login: Login):
        """Starts the client.

        Raises:
            OSError: there is no such client.
        """
        self._client = subprocess.Popen(
            remote.command(login),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._client.stdin
        assert self._client.stdout
        assert self._client.stderr
        self.stdin, self.stdout = self._client.stdin.fileno(), self._client.stdout.fileno()
        for pipe in (self.stdin, self.stdout, self._client.stderr.fileno()):
            os.set_blocking(pipe, False)

    def complaint(self) -> str:
        """The last line of what the client has said on its standard error."""
        assert self._client.stderr
        try:
            said = os.read(self._client.stderr.fileno(), 1 << 16)
        except BlockingIOError:
            said = b""
        lines = said.decode(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else ""

    def close(self) -> None:
        """Ends it; the agent notices."""
        for pipe in (self._client.stdin, self._client.stdout, self._client.stderr):
            if pipe:
                pipe.close()
        self._client.kill()
        self._client.wait()
