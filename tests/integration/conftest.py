"""Real worker processes: started, watched, and gone at the end of each test."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import hosts
import pytest
import sshd
import trajectory

from launch import ports

ROOT = Path(__file__).parents[2]


_held = []


def free_addresses(count):
    """'127.0.0.1:port' of so many free ports, which nobody else is given while the tests run."""
    sockets = ports.hold_free(count, ())
    _held.extend(sockets)
    return [f"127.0.0.1:{ports.number(each)}" for each in sockets]


def environment(addresses=None, index=0):
    """The environment of a worker, without a GPU and without what this process has of a cluster."""
    environ = {k: v for k, v in os.environ.items() if k != "TF_CONFIG"}
    environ |= {
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "-1",
        "TF_NUM_INTRAOP_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    if addresses is not None:
        task = {"type": "worker", "index": index}
        environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": addresses}, "task": task})
    return environ


class Group:
    """Worker processes of one test."""

    def __init__(self, folder):
        self._folder = folder
        self._count = 0
        self.processes = []

    def start(self, command, addresses=None, index=0, environ=None):
        """Starts `python` with these arguments; its output goes to a file.

        `environ` comes on top of the environment of a worker.
        """
        log = self._folder / f"process-{self._count}.log"
        self._count += 1
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, *map(str, command)],
                env=environment(addresses, index) | (environ or {}),
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        process.log = log
        self.processes.append(process)
        return process

    def start_all(self, count, command):
        """`count` workers of one cluster."""
        addresses = free_addresses(count)
        return [self.start(command, addresses, index) for index in range(count)]

    def wait(self, timeout_s=120):
        """Their exit statuses, in the order of their start."""
        return [process.wait(timeout_s) for process in self.processes]

    def output(self, index):
        return self.processes[index].log.read_text(errors="replace")

    def next_round(self):
        """Ends what still runs; processes are numbered from 0 again."""
        self.end()
        self.processes = []

    def end(self):
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="session")
def new_group():
    """fn(folder) -> Group, ended with the session at the latest."""
    started = []

    def make(folder):
        started.append(Group(folder))
        return started[-1]

    yield make
    for each in started:
        each.end()
    while _held:
        _held.pop().close()


@pytest.fixture
def group(new_group, tmp_path):
    started = new_group(tmp_path)
    yield started
    started.end()


@pytest.fixture(scope="session")
def whole_run(new_group, tmp_path_factory):
    """The workdir of the run of `trajectory` by one process, without a fault."""
    folder = tmp_path_factory.mktemp("whole")
    group = new_group(folder)
    group.start([*trajectory.TRAIN, trajectory.AT_ONCE, "--workdir=run"])
    assert group.wait(180) == [0], group.output(0)
    return folder / "run"


@pytest.fixture
def addresses():
    """fn(count) -> addresses on loopback."""
    return free_addresses


@pytest.fixture(scope="module")
def ssh_hosts(tmp_path_factory):
    """n1, n2, n3 with ssh servers, as (network, ssh's configuration), where there can be some."""
    if reason := sshd.why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("hosts")
    with hosts.Network(folder, ["n1", "n2", "n3"]) as network:
        yield network, sshd.start(network, folder)


@pytest.fixture
def cluster(ssh_hosts, tmp_path):
    """Launchers on these hosts, and after each test the proof that nothing of it is left."""
    cluster = sshd.Cluster(*ssh_hosts, tmp_path / "run")
    try:
        yield cluster
    finally:
        left = cluster.end()
    assert left == {}
