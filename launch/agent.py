"""The agent: our end of an ssh connection on another machine. `launch.remote` sends it there.

It runs one worker, as its guard's parent, and speaks to `launch.relay` in the way described there.
It imports nothing but the standard library and what is sent along with it.

When its input ends, or falls silent (a cut link ends nothing), it lets go of the guard's socket,
and the guard kills the worker's tree. The guard does so too if the agent itself is killed.
"""

import contextlib
import os
import select
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any

from launch import guard, ports, relay

# What is left in the pipes of a dead tree is read at once.
_DRAIN_S = 5.0


def main(request: Mapping[str, Any]) -> None:
    """Runs the worker that `launch.remote` describes."""
    _Agent(request).run()


def environment(carried: Mapping[str, str]) -> dict[str, str]:
    """This machine's own environment with what was carried over; PATH has both."""
    own = os.environ.get("PATH", os.defpath)
    paths = [*carried.get("PATH", "").split(":"), *own.split(":")]
    path = ":".join(dict.fromkeys(path for path in paths if path))
    return {**os.environ, **carried, "PATH": path}


class _Agent:
    def __init__(self, request: Mapping[str, Any]):
        self._link_timeout_s = request["link_timeout_s"]
        if request["held_port"]:
            with contextlib.suppress(OSError):  # somebody has it: the worker finds out, and says so
                self._held = ports.hold(request["held_port"])
        guard.adopt_orphans()
        self._control, guard_side = socket.socketpair()
        self._sources: dict[int, bytes] = {}
        ends = []
        for kind in (relay.STDOUT, relay.STDERR):
            source, end = os.pipe()
            self._sources[source] = kind
            ends.append(end)
        self._guard = os.fork()
        if self._guard == 0:
            _become_guard(request, guard_side, ends)
        guard_side.close()
        for end in ends:
            os.close(end)
        self._news = b""
        self._relay = relay.Outlet(1)

    def run(self) -> None:
        """Serves until the guard has gone and all output is passed on, or nobody takes it."""
        control = self._control.fileno()
        inputs = [0, control]
        heard_at, beat_at = time.monotonic(), 0.0
        end_at = float("inf")
        has_ended = False
        self._relay.write(relay.HELLO)
        while not has_ended or self._relay.pending:
            is_full = len(self._relay.pending) > relay.FULL
            reads = [*inputs, *([] if is_full else self._sources)]
            writes = [1] if self._relay.pending else []
            ready, writable, _ = select.select(reads, writes, [], relay.BEAT_S / 2)
            now = time.monotonic()
            if writable:
                self._relay.write(b"")
            for source in set(ready) & set(self._sources):
                if chunk := os.read(source, 1 << 16):
                    self._send(self._sources[source], chunk)
                else:
                    del self._sources[source]
            if control in ready and not self._take_news():
                inputs.remove(control)
                guard.kill_tree()  # there is one, if the guard was killed itself
                end_at = now + _DRAIN_S
            elif control not in inputs and is_full:
                end_at = now + _DRAIN_S
            if 0 in ready:
                heard_at = now
            # After the look: a machine that slept finds what came meanwhile.
            if 0 in inputs and (
                (0 in ready and not self._pass_on()) or now - heard_at > self._link_timeout_s
            ):
                self._let_go()
                inputs.remove(0)
            if has_ended:
                continue
            if control not in inputs and (not self._sources or now > end_at):
                has_ended = True
                self._send(relay.END)
            elif now >= beat_at:
                self._send(relay.BEAT)
                beat_at = now + relay.BEAT_S

    def _pass_on(self) -> bool:
        """Hands signals to the guard; False: there is nobody any more to send some."""
        try:
            requests = os.read(0, 64)
        except OSError:
            return False
        if signals := requests.replace(b"\0", b""):
            with contextlib.suppress(OSError):
                self._control.send(signals)
        return bool(requests)

    def _let_go(self) -> None:
        """Nobody hears us any more: the guard kills all, and the output goes nowhere."""
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_WR)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        self._relay.pending = b""

    def _take_news(self) -> bool:
        try:
            data = self._control.recv(4096)
        except OSError:
            data = b""
        *lines, self._news = (self._news + data).split(b"\n")
        for line in lines:
            self._send(relay.NEWS, line)
        return bool(data)

    def _send(self, kind: bytes, content: bytes = b"") -> None:
        self._relay.write(relay.HEADER.pack(kind, len(content)) + content)


def _become_guard(request: Mapping[str, Any], control: socket.socket, ends: list[int]) -> None:
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(ends[0], 1)
        os.dup2(ends[1], 2)
        # Also the agent's ends, else neither would ever see the other's end.
        os.closerange(3, control.fileno())
        os.closerange(control.fileno() + 1, 256)
        os.environ.update(environment(request["env"]))
        try:
            os.chdir(request["directory"])
        except OSError as error:
            print(f"dist-launch: {request['directory']}: {error.strerror}", file=sys.stderr)
            control.send(f"unrunnable {error.errno}\n".encode())
        else:
            guard.guard(control.fileno(), request["command"], set(request["cpus"]))
    finally:
        sys.stderr.flush()
        os._exit(0)
