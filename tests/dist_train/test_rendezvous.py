import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest

from dist_train import RunError, UsageError, rendezvous
from dist_train.cluster import Cluster
from dist_train.rendezvous import _listen, meet

_welcome = rendezvous._Chief._welcome
_ROOT = Path(__file__).parents[2]
_IDENTITY = {"batch_size": 64, "tensorflow": "2.21.0", "learning_rate": 0.1, "workdir": None}


def _addresses(workers: int) -> tuple[str, ...]:
    """Addresses with ports that are free now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(workers)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return tuple(f"127.0.0.1:{each.getsockname()[1]}" for each in sockets)


def _meet_all(
    identities: list[dict], *, timeout_s: float = 10.0, tokens: dict[int, str] | None = None
) -> list[BaseException | None]:
    """What `meet` raised on each worker; they are heard one after the other."""
    addresses = _addresses(len(identities))
    heard = [threading.Event() for _ in identities]

    def welcome(chief: rendezvous._Chief, hello: dict, connection: socket.socket) -> None:
        try:
            _welcome(chief, hello, connection)
        finally:
            heard[hello["index"]].set()

    def one(index: int) -> None:
        assert index < 2 or heard[index - 1].wait(20)
        token = (tokens or {}).get(index, "secret")
        meet(Cluster(addresses, index), identities[index], timeout_s=timeout_s, token=token)

    with (
        mock.patch.object(rendezvous._Chief, "_welcome", welcome),
        ThreadPoolExecutor(len(identities)) as pool,
    ):
        futures = [pool.submit(one, index) for index in range(len(identities))]
        return [future.exception(timeout=30) for future in futures]


@contextlib.contextmanager
def _chief(addresses: tuple[str, ...], *, timeout_s: float = 5.0, token: str = ""):
    """A chief that listens, as a Future."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(
            meet, Cluster(addresses, 0), _IDENTITY, timeout_s=timeout_s, token=token
        )
        yield future


def _connect(address: str) -> socket.socket:
    host, port = address.split(":")
    deadline = time.monotonic() + 5
    while True:
        try:
            return socket.create_connection((host, int(port)), timeout=5)
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def _join(addresses: tuple[str, ...], index: int, **options) -> Future:
    future: Future = Future()
    try:
        future.set_result(meet(Cluster(addresses, index), _IDENTITY, timeout_s=5.0, **options))
    except Exception as error:
        future.set_exception(error)
    return future


@pytest.mark.parametrize("workers", [2, 3, 8])
def test_workers_that_agree_meet(workers):
    assert _meet_all([_IDENTITY] * workers) == [None] * workers


def test_one_worker_waits_for_nobody():
    meet(Cluster(("nowhere.invalid:1",), 0), _IDENTITY, timeout_s=0.0)


def test_the_port_is_free_afterwards():
    addresses = _addresses(2)
    for _ in range(2):
        with _chief(addresses) as chief:
            _join(addresses, 1).result()
            chief.result(timeout=10)
        host, port = addresses[0].split(":")
        with socket.socket() as listener:
            listener.bind((host, int(port)))  # without SO_REUSEADDR


def test_a_late_chief_is_waited_for():
    addresses = _addresses(2)
    with ThreadPoolExecutor(1) as pool:
        worker = pool.submit(meet, Cluster(addresses, 1), _IDENTITY, timeout_s=10.0)
        time.sleep(0.4)
        assert not worker.done()
        meet(Cluster(addresses, 0), _IDENTITY, timeout_s=10.0)
        worker.result(timeout=10)


def test_ipv6_addresses_work():
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("no IPv6 on this machine")
        port = probe.getsockname()[1]
    addresses = (f"[::1]:{port}", "[::1]:1")
    with _chief(addresses) as chief:
        _join(addresses, 1).result()
        chief.result(timeout=10)


def test_missing_workers_are_named_with_their_addresses():
    addresses = _addresses(4)
    with ThreadPoolExecutor(2) as pool:
        chief, second = (
            pool.submit(meet, Cluster(addresses, index), _IDENTITY, timeout_s=2.0)
            for index in (0, 2)
        )
        for future in (chief, second):  # who has come learns who has not
            message = str(future.exception(timeout=20))
            assert f"worker 1 ({addresses[1]}), worker 3 ({addresses[3]}) never arrived" in message
            assert f"worker 2 ({addresses[2]})" not in message
            assert "within 2 s" in message
            assert isinstance(future.exception(), RunError)


def test_missing_chief_is_named():
    addresses = _addresses(2)
    begin = time.monotonic()
    with pytest.raises(RunError, match=r"the chief, worker 0 \(127.0.0.1:\d+\), never arrived"):
        meet(Cluster(addresses, 1), _IDENTITY, timeout_s=0.5)
    assert 0.4 < time.monotonic() - begin < 5.0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_size": 32}, "disagree on batch_size: 64 and 32"),
        ({"tensorflow": "2.20.0"}, "disagree on tensorflow: '2.21.0' and '2.20.0'"),
        ({"learning_rate": 0.1 + 1e-9}, "disagree on learning_rate"),
        ({"extra": 1}, "disagree on extra: None and 1"),
        ({"batch_size": 32, "tensorflow": "x"}, "batch_size: 64 and 32; tensorflow: '2.21.0' and"),
    ],
)
def test_differences_are_shown_to_all(changed, message):
    raised = _meet_all([_IDENTITY, _IDENTITY, _IDENTITY | changed])
    assert all(isinstance(error, UsageError) for error in raised)
    assert all(message in str(error) for error in raised)
    assert "worker 2 (127.0.0.1:" in str(raised[0])


def test_another_list_of_workers_is_a_difference():
    addresses = _addresses(3)
    with _chief(addresses) as chief:
        other = Cluster((addresses[0], addresses[2], addresses[1]), 1)
        with pytest.raises(UsageError, match="disagree on workers"):
            meet(other, _IDENTITY, timeout_s=5.0)
        assert isinstance(chief.exception(timeout=10), UsageError)


def test_a_worker_of_a_larger_cluster_is_an_error():
    addresses = _addresses(3)
    with _chief(addresses[:2]) as chief:
        with pytest.raises(
            UsageError, match=r"says that it is worker 2 .* the chief has 2 workers"
        ):
            meet(Cluster(addresses, 2), _IDENTITY, timeout_s=5.0)
        assert isinstance(chief.exception(timeout=10), UsageError)


def test_two_processes_with_one_index_are_an_error():
    addresses = _addresses(3)
    with _chief(addresses) as chief, ThreadPoolExecutor(2) as pool:
        same = [
            pool.submit(meet, Cluster(addresses, 1), _IDENTITY, timeout_s=5.0) for _ in range(2)
        ]
        for future in [chief, *same]:
            error = future.exception(timeout=10)
            assert isinstance(error, UsageError)
            assert f"two processes say that they are worker 1 ({addresses[1]})" in str(error)


def test_wrong_token_is_turned_away():
    raised = _meet_all([_IDENTITY, _IDENTITY], timeout_s=2.0, tokens={1: "guess"})
    assert "never arrived" in str(raised[0])
    assert "is its token another one?" in str(raised[1])


_HELLO = {"greeting": "dist_train rendezvous 1", "token": "", "index": 1, "identity": {}}


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff\xfe\x00\n",
        b"{}\n",
        b"[]\n",
        b"1\n",
        b"9" * 5000 + b"\n",
        b"[" * 100_000 + b"\n",
        b"x" * (3 << 20),
        json.dumps(_HELLO | {"greeting": "dist_train rendezvous 0"}).encode() + b"\n",
        json.dumps(_HELLO | {"token": "\ud800"}).encode() + b"\n",
        json.dumps(_HELLO | {"token": None}).encode() + b"\n",
        json.dumps(_HELLO | {"index": "1"}).encode() + b"\n",
        json.dumps(_HELLO | {"index": True}).encode() + b"\n",
        json.dumps(_HELLO | {"identity": [1]}).encode() + b"\n",
        json.dumps(_HELLO | {"identity": None}).encode() + b"\n",
        json.dumps(_HELLO).encode(),  # without its end
    ],
    ids=lambda sent: repr(sent[:70]),
)
def test_strangers_on_the_port_do_not_disturb(sent):
    addresses = _addresses(2)
    with _chief(addresses) as chief:
        with _connect(addresses[0]) as stranger, contextlib.suppress(ConnectionError):
            stranger.sendall(sent)
            stranger.shutdown(socket.SHUT_WR)
            assert stranger.recv(1) == b""  # turned away, unheard
        _join(addresses, 1).result()
        chief.result(timeout=10)


def test_a_silent_stranger_does_not_hold_up():
    addresses = _addresses(2)
    with _chief(addresses) as chief, _connect(addresses[0]) as stranger:
        stranger.sendall(b"{")
        _join(addresses, 1).result()
        chief.result(timeout=10)


def test_a_worker_that_comes_and_goes_counts_as_missing():
    addresses = _addresses(3)
    with _chief(addresses, timeout_s=2.0) as chief:
        identity = {**_IDENTITY, "workers": list(addresses)}
        with _connect(addresses[0]) as worker:
            worker.sendall(json.dumps(_HELLO | {"identity": identity}).encode() + b"\n")
            worker.shutdown(socket.SHUT_WR)
            assert worker.recv(1) == b""
        message = str(chief.exception(timeout=10))
    assert f"worker 1 ({addresses[1]}), worker 2 ({addresses[2]}) never arrived" in message


def test_a_worker_that_says_more_than_hello_is_turned_away():
    addresses = _addresses(3)
    with _chief(addresses, timeout_s=2.0) as chief:
        hello = json.dumps(_HELLO | {"identity": {**_IDENTITY, "workers": list(addresses)}})
        with _connect(addresses[0]) as worker:
            worker.sendall(hello.encode() + b"\n")
            time.sleep(0.2)
            worker.sendall(hello.encode() + b"\n")
            assert worker.recv(1) == b""
        error = chief.exception(timeout=10)
    assert isinstance(error, RunError)
    assert f"worker 1 ({addresses[1]})" in str(error)


def test_a_taken_port_is_an_error_that_names_it():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(RunError, match=f"cannot listen on its own address {address}"):
            meet(Cluster((address, "127.0.0.1:1"), 0), _IDENTITY, timeout_s=5.0)


def test_an_address_of_another_host_is_an_error():
    with pytest.raises(RunError, match=r"its own address 192\.0\.2\.1:4000"):
        meet(Cluster(("192.0.2.1:4000", "127.0.0.1:1"), 0), _IDENTITY, timeout_s=5.0)


def _let_resolve(monkeypatch, name: str, from_s: float) -> None:
    """Makes a name mean this machine from a time on; no query goes out for it."""
    resolve = socket.getaddrinfo

    def resolve_later(host, *arguments, **options):
        if host == name and time.monotonic() < from_s:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return resolve("127.0.0.1" if host == name else host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve_later)


def test_the_chief_waits_until_its_own_name_resolves(monkeypatch):
    """The DNS of Kubernetes learns a pod's name a moment after its start."""
    _let_resolve(monkeypatch, "pod-0.service", time.monotonic() + 1.0)
    cluster = (_addresses(1)[0].replace("127.0.0.1", "pod-0.service"), "127.0.0.1:1")
    with _chief(cluster, timeout_s=20.0) as chief:
        meet(Cluster(cluster, 1), _IDENTITY, timeout_s=20.0)
        assert chief.result(timeout=20) is None


def test_a_name_that_never_resolves_is_an_error_at_the_timeout(monkeypatch):
    _let_resolve(monkeypatch, "nowhere", float("inf"))
    begin = time.monotonic()
    with pytest.raises(RunError, match=r"own address nowhere:4000 cannot be used: .*known"):
        meet(Cluster(("nowhere:4000", "127.0.0.1:1"), 0), _IDENTITY, timeout_s=0.5)
    assert time.monotonic() - begin >= 0.5


def test_a_server_that_is_no_chief_is_not_mistaken_for_one():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.settimeout(0.2)
        address = f"127.0.0.1:{server.getsockname()[1]}"
        end = threading.Event()

        def serve() -> None:
            while not end.is_set():
                with contextlib.suppress(TimeoutError):
                    connection, _ = server.accept()
                    with connection:
                        connection.recv(1 << 16)
                        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            with pytest.raises(RunError, match=r"the chief, worker 0 .* never arrived within 2 s"):
                meet(Cluster((address, "127.0.0.1:1"), 1), _IDENTITY, timeout_s=2.0)
        finally:
            end.set()
            thread.join()


@pytest.mark.parametrize("index", [0, 1])
def test_sigterm_ends_the_wait_at_once(index):
    addresses = _addresses(2)
    code = (
        "import sys\n"
        "from dist_train import stopping, rendezvous, Stopped\n"
        "from dist_train.cluster import Cluster\n"
        "try:\n"
        "    with stopping.listening():\n"
        "        print('waiting', flush=True)\n"
        f"        rendezvous.meet(Cluster({addresses!r}, {index}), {{}}, timeout_s=60.0)\n"
        "except Stopped as error:\n"
        "    print(error)\n"
        "    sys.exit(error.exit_status)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(_ROOT)},
    ) as process:
        assert process.stdout.readline() == "waiting\n"
        time.sleep(0.3)
        begin = time.monotonic()
        process.send_signal(signal.SIGTERM)
        rest = process.communicate(timeout=20)[0]
        assert time.monotonic() - begin < 5.0
    assert process.returncode == 75
    assert "by SIGTERM" in rest


def test_a_chief_whose_own_name_is_loopback_is_reached_by_other_hosts_all_the_same():
    port = socket.create_server(("127.0.0.1", 0))
    number = port.getsockname()[1]
    port.close()
    chief = f"127.0.0.1:{number}"  # as Debian resolves a machine's own name, to 127.0.1.1
    with (
        _listen(chief, time.monotonic(), may_be_loopback=False),
        socket.create_connection(("127.0.0.2", number), timeout=5),
    ):
        pass
    with (
        _listen(chief, time.monotonic(), may_be_loopback=True),
        pytest.raises(ConnectionRefusedError),
    ):
        socket.create_connection(("127.0.0.2", number), timeout=5)
