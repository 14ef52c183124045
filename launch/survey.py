"""A survey of another machine: what kind it is, and whether a worker could run there.

`launch.remote` sends it there, and it answers lines of JSON:

    at once                  {"time": 1.7e9, "machine": {…}, "ports": [40123]}; with `checks` also
                             "listens": the address, "directory", "command", "versions"
    {"connect": [[h, p]]}    {"unreachable": [["h:p", "Connection refused"]]}
    {"release": false}       {}: nobody listens any more, the ports are still kept for the workers;
                             true: they are not

The ports are kept until input ends, or for 20 s more: by then the workers' own agents keep them. It
never stays longer, as nobody tells it when its link is cut.
"""

import dataclasses
import errno
import json
import os
import re
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

from launch import agent, binding, ports

# Three questions, for each of which the launcher waits up to 10 s for the slowest host; after the
# last one it starts the workers.
_LIFE_S = 30
_KEEP_S = 20
_CONNECT_S = 2.0
_VERSIONS_S = 8.0
_VERSIONS = """
import importlib.metadata, json, platform
found = {"Python": platform.python_version()}
for name in ("tensorflow", "keras", "numpy", "dist_train"):
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


def main(request: Mapping[str, Any]) -> None:
    """Answers until its input ends."""
    signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
    signal.alarm(_LIFE_S)
    held = ports.hold_free(request["ports"], request["former_ports"])
    free = [ports.number(sock) for sock in held]
    answer: dict[str, Any] = {
        "time": time.time(),
        "machine": dataclasses.asdict(binding.this_machine()),
        "ports": free,
    }
    listeners: list[socket.socket] = []
    if request["checks"]:
        listeners, address = _listen(request["address"], free)
        answer |= {"listens": address, **_check(request)}
    _answer(answer)
    for line in sys.stdin.buffer:
        message = json.loads(line)
        if "connect" in message:
            _answer({"unreachable": _connect([tuple(target) for target in message["connect"]])})
        if message.get("release"):
            listeners += held
        if "release" in message:
            for sock in listeners:
                sock.close()
            _answer({})
            signal.alarm(_KEEP_S)


def _answer(message: Mapping[str, Any]) -> None:
    print(json.dumps(message), flush=True)


def _listen(host: str, free: list[int]) -> tuple[list[socket.socket], str]:
    """Listens as a worker does, on what this machine takes its own name for.

    Returns:
        The sockets, and that address or why it cannot be used.
    """
    listeners = []
    address = host
    try:
        for port in free:
            family, _, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            address = str(target[0])
            sock = socket.socket(family, socket.SOCK_STREAM)
            listeners.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(target)
            sock.listen(64)
    except OSError as error:
        return listeners, f"{address}: {error.strerror or error}"
    return listeners, address


def _check(request: Mapping[str, Any]) -> dict[str, Any]:
    env = agent.environment(request["env"])
    try:
        os.chdir(request["directory"])
    except OSError as error:
        return {"directory": error.strerror}
    name = request["command"][0]
    found = shutil.which(name, path=env["PATH"])
    if found is None:
        exists = os.sep in name and os.path.exists(name)
        return {"command": "not executable" if exists else "missing"}
    interpreter = _interpreter(found, env["PATH"])
    return {"versions": _versions(interpreter, env)} if interpreter else {}


def _interpreter(path: str, search: str) -> str | None:
    """The Python that runs a program, as far as its name or its first lines say."""
    if re.fullmatch(r"python[\d.]*", os.path.basename(path)):
        return path
    try:
        with open(path, "rb") as file:
            head = file.read(512).decode(errors="replace")
    except OSError:
        return None
    # The second form is an installer's, where the path is too long for the kernel or has a space.
    match = re.match(r"#! *(\S*/)?(env +)?(python[\d.]*)\s", head)
    if match:
        name = match[3] if match[2] else (match[1] or "") + match[3]
        return shutil.which(name, path=search)
    match = re.match(r"""#!/bin/sh\n'''exec' ("[^"]+"|\S+) """, head)
    return match[1].strip('"') if match else None


def _versions(python: str, env: Mapping[str, str]) -> dict[str, str]:
    try:
        run = subprocess.run(
            [python, "-c", _VERSIONS],
            capture_output=True,
            env=env,
            stdin=subprocess.DEVNULL,
            timeout=_VERSIONS_S,
        )
        return json.loads(run.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return {"Python": f"{python} does not run"}


def _connect(targets: list[tuple[str, int]]) -> list[list[str]]:
    """Tries all at once; the addresses that cannot be reached, and why."""
    failed = []
    deadline = time.monotonic() + _CONNECT_S
    with selectors.DefaultSelector() as selector:
        for host, port in targets:
            name = f"{host}:{port}"
            try:
                family, _, _, _, target = socket.getaddrinfo(
                    host.strip("[]"), port, type=socket.SOCK_STREAM
                )[0]
                sock = socket.socket(family, socket.SOCK_STREAM)
                sock.setblocking(False)
                if (number := sock.connect_ex(target)) not in (0, errno.EINPROGRESS):
                    sock.close()
                    raise OSError(number, os.strerror(number))
            except OSError as error:
                failed.append([name, error.strerror or str(error)])
                continue
            selector.register(sock, selectors.EVENT_WRITE, name)
        while selector.get_map() and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                sock = key.fileobj  # type: ignore[assignment]
                selector.unregister(sock)
                if number := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                    failed.append([key.data, os.strerror(number)])
                sock.close()
        for key in list(selector.get_map().values()):
            failed.append([key.data, "no answer"])
            key.fileobj.close()  # type: ignore[union-attr]
    return failed
