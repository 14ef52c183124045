"""Rendezvous: all workers arrive, prove that they agree, and only then start TensorFlow.

TensorFlow's own start waits up to an hour for a missing worker, ignores SIGTERM meanwhile and does
not say whom it waits for. So the workers first meet over plain sockets on the chief's own address:
each sends one line of JSON that says who it is and what it is about to run; the chief answers all
of them at once, when all are there or when it has found out why it cannot work. Afterwards the port
is free for TensorFlow.
"""

import contextlib
import hmac
import ipaddress
import json
import selectors
import socket
import time
from collections.abc import Mapping
from typing import Any

from absl import logging

from dist_train.cluster import Cluster
from dist_train.errors import RunError, UsageError
from dist_train.settings import differences

_RETRY_S = 0.1
_MAX_LINE = 1 << 20
_GREETING = "dist_train rendezvous 1"


def meet(
    cluster: Cluster, identity: Mapping[str, Any], *, timeout_s: float, token: str = ""
) -> None:
    """Returns when all workers have arrived with the same identity.

    Args:
      cluster: the workers; the chief listens on its own address, the others connect to it.
      identity: what must be equal on all workers, by name; JSON values.
      timeout_s: bound of the wait, in seconds.
      token: a secret that all workers share; a stranger without it is turned away.

    Raises:
      RunError: workers are missing at the timeout (they are named), or the chief's port is taken.
      UsageError: the workers disagree; the differences are shown.
    """
    if len(cluster.addresses) == 1:
        return
    identity = json.loads(json.dumps({**identity, "workers": list(cluster.addresses)}))
    deadline = time.monotonic() + timeout_s
    if cluster.is_chief:
        _Chief(cluster, identity, token).host(deadline, timeout_s)
    else:
        _join(cluster, identity, deadline, timeout_s, token)


class _Chief:
    """Collects one hello per worker and answers them all."""

    def __init__(self, cluster: Cluster, identity: Mapping[str, Any], token: str):
        self._cluster = cluster
        self._identity = identity
        self._token = token
        self._arrived: dict[int, socket.socket] = {}
        self._unread: dict[socket.socket, bytes] = {}

    def host(self, deadline: float, timeout_s: float) -> None:
        with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
            hosts = {_split(address)[0] for address in self._cluster.addresses}
            listener = stack.enter_context(
                _listen(self._cluster.addresses[0], deadline, may_be_loopback=len(hosts) == 1)
            )
            selector.register(listener, selectors.EVENT_READ)
            try:
                while len(self._arrived) < len(self._cluster.addresses) - 1:
                    remaining = deadline - time.monotonic()
                    if remaining <= 0:
                        raise RunError(self._missing(timeout_s))
                    for key, _ in selector.select(remaining):
                        if key.fileobj is listener:
                            connection, _ = listener.accept()
                            stack.enter_context(connection)
                            connection.setblocking(False)
                            selector.register(connection, selectors.EVENT_READ)
                            self._unread[connection] = b""
                        else:
                            self._read(key.fileobj, selector)  # type: ignore[arg-type]
            except (RunError, UsageError) as error:
                kind = "usage" if isinstance(error, UsageError) else "run"
                self._answer({kind: str(error)})
                raise
            self._answer({})
            # The peers close first, so that no connection of the chief's port lingers in TIME_WAIT.
            for connection in self._arrived.values():
                connection.settimeout(max(0.1, min(2.0, deadline - time.monotonic())))
                with contextlib.suppress(OSError):
                    connection.recv(1)

    def _read(self, connection: socket.socket, selector: selectors.BaseSelector) -> None:
        try:
            data = connection.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        line = self._unread[connection] + data
        self._unread[connection] = line
        complete = line.endswith(b"\n")
        if data and not complete and len(line) <= _MAX_LINE:
            return
        hello = _decode(line) if complete else None
        known = next((i for i, c in self._arrived.items() if c is connection), None)
        if known is not None:  # it had arrived, and left (or babbles) before the answer
            del self._arrived[known]
        if hello is None or known is not None or not self._is_member(hello):
            selector.unregister(connection)
            connection.close()
            return
        self._unread[connection] = b""
        self._welcome(hello, connection)

    def _is_member(self, hello: dict) -> bool:
        """Whether it is a worker of this run: a stranger on the port is turned away unheard."""
        token, index = hello.get("token"), hello.get("index")
        return (
            isinstance(token, str)
            and hmac.compare_digest(_bytes(token), _bytes(self._token))
            and type(index) is int
            and isinstance(hello.get("identity"), dict)
        )

    def _welcome(self, hello: dict, connection: socket.socket) -> None:
        index, theirs = hello["index"], hello["identity"]
        if not 0 < index < len(self._cluster.addresses):
            self._arrived[-1] = connection  # so that it gets the answer too
            raise UsageError(
                f"a worker says that it is worker {index} of {theirs.get('workers')}; the chief has"
                f" {len(self._cluster.addresses)} workers"
            )
        if index in self._arrived:
            self._arrived[-1] = connection
            raise UsageError(f"two processes say that they are {self._cluster.name(index)}")
        self._arrived[index] = connection
        if different := differences(self._identity, theirs):
            shown = "; ".join(f"{name}: {a!r} and {b!r}" for name, (a, b) in different.items())
            raise UsageError(
                f"the chief and {self._cluster.name(index)} disagree on {shown}; start all workers"
                " with the same command, code and versions"
            )

    def _missing(self, timeout_s: float) -> str:
        names = [
            self._cluster.name(index)
            for index in range(1, len(self._cluster.addresses))
            if index not in self._arrived
        ]
        return (
            f"{', '.join(names)} never arrived at {self._cluster.name(0)} within {timeout_s:g} s;"
            " look at their logs, or raise --start_timeout_s"
        )

    def _answer(self, answer: dict) -> None:
        for connection in self._arrived.values():
            connection.settimeout(2.0)
            with contextlib.suppress(OSError):  # it has gone; its own exit says why
                connection.sendall(json.dumps(answer).encode() + b"\n")


def _join(
    cluster: Cluster, identity: Mapping[str, Any], deadline: float, timeout_s: float, token: str
) -> None:
    hello = {"greeting": _GREETING, "token": token, "index": cluster.index, "identity": identity}
    host, port = _split(cluster.addresses[0])
    reason: OSError | str = "nothing listens there"
    turned_away = False
    while (remaining := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=min(remaining, 5.0)) as connection:
                connection.sendall(json.dumps(hello).encode() + b"\n")
                # The chief's own bound ends this wait; the slack lets its answer arrive.
                connection.settimeout(max(0.1, deadline - time.monotonic()) + 5.0)
                with connection.makefile("rb") as stream:
                    answer = _decode(stream.readline(_MAX_LINE), greeting=False)
            if answer is not None:
                if "usage" in answer:
                    raise UsageError(answer["usage"])
                if "run" in answer:
                    raise RunError(answer["run"])
                return
            turned_away = True
        except OSError as error:
            reason = error
        time.sleep(_RETRY_S)
    if turned_away:  # tells more than how the last attempt ended
        reason = "it closed the connection (is its token another one?)"
    raise RunError(
        f"the chief, {cluster.name(0)}, never arrived within {timeout_s:g} s ({reason});"
        " look at its log, or raise --start_timeout_s"
    )


def _listen(address: str, deadline: float, *, may_be_loopback: bool) -> socket.socket:
    """A socket on the chief's address.

    Args:
      may_be_loopback: whether all workers are on this machine.
    """
    host, port = _split(address)
    try:
        family, own = _resolve(host, port, deadline)
        if not may_be_loopback and ipaddress.ip_address(own[0]).is_loopback:
            # Debian's /etc/hosts gives a machine's own name 127.0.1.1. TensorFlow's server listens
            # on all addresses anyway.
            own = ("::" if family == socket.AF_INET6 else "0.0.0.0", *own[1:])
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise RunError(f"the chief's own address {address} cannot be used: {error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(own)
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise RunError(
            f"the chief cannot listen on its own address {address}: {error.strerror};"
            " give it another port"
        ) from error
    return listener


def _resolve(host: str, port: int, deadline: float) -> tuple[int, tuple]:
    """Address family and socket address.

    It may take a while: the DNS of Kubernetes learns a pod's name a moment after its start.
    """
    has_warned = False
    while True:
        try:
            family, *_, own = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            return family, own
        except socket.gaierror as error:
            if time.monotonic() >= deadline:
                raise
            if not has_warned:
                logging.warning("waiting for the chief's own name, %s: %s", host, error)
                has_warned = True
        time.sleep(_RETRY_S)


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogatepass")  # JSON can spell halves of a pair


def _decode(line: bytes, *, greeting: bool = True) -> dict | None:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(message, dict):
        return None
    if greeting and message.get("greeting") != _GREETING:
        return None
    return message
