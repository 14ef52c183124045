"""The machines that other tests stand on."""

import signal
import subprocess
import sys
import time

import hosts
import pytest
import sshd

pytestmark = pytest.mark.skipif(bool(sshd.why_not()), reason=sshd.why_not() or "-")


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    folder = tmp_path_factory.mktemp("network")
    with hosts.Network(folder, ["n1", "n2"]) as network:
        network.ssh_config = sshd.start(network, folder)
        yield network


def connects(network, name):
    source = f"import socket; socket.create_connection(('{name}', 22), 0.5)"
    with network["n1"].start([sys.executable, "-S", "-c", source], stderr=subprocess.DEVNULL) as it:
        return it.wait() == 0


def test_hosts_reach_one_another_and_nobody_else(network):
    assert connects(network, "n2")
    source = "import socket; socket.create_connection(('192.0.2.1', 22), 5)"
    with network["n1"].start([sys.executable, "-S", "-c", source], stderr=subprocess.PIPE) as it:
        assert b"Network is unreachable" in it.communicate()[1]


def test_cut_cable_is_cut_until_it_is_mended(network):
    network["n2"].cut()
    assert not connects(network, "n2")
    network["n2"].mend()
    assert hosts.wait_until(lambda: connects(network, "n2"))


def test_ssh_leads_to_a_host_with_a_name_of_its_own(network):
    command = ["ssh", "-F", network.ssh_config, "n2", "hostname"]
    assert network.head.run(command) == "n2\n"


def test_nothing_of_a_network_outlives_the_tests(tmp_path):
    source = f"""
import sys, time
sys.path.insert(0, {str(hosts.Path(hosts.__file__).parent)!r})
import hosts
with hosts.Network({str(tmp_path)!r}, ["n1"]) as network:
    inside = network["n1"].start(["setsid", "sleep", "60"])
    print(network.head.pid, network["n1"].pid, inside.inside, flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE) as process:
        pids = process.stdout.readline().split()
        process.send_signal(signal.SIGKILL)
    assert len(pids) == 3
    assert hosts.wait_until(lambda: not any(_lives(pid.decode()) for pid in pids))


def _lives(pid):
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except OSError:
        return False


def test_sandbox_refuses_a_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr(hosts, "_BRIDGE", "")
    route = "ip link set lo up\nip route add default dev lo\n"
    monkeypatch.setattr(hosts, "_BEGIN", route + hosts._BEGIN)
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match="default route"), hosts.Network(tmp_path, []):
        pass
    assert time.monotonic() - begin < 10
