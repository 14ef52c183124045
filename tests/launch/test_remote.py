"""Relay, agent and survey without a network: an `ssh` that runs the command on this machine."""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def ssh(launcher, tmp_path):
    """fn(*arguments) -> a started launcher of two workers on one host that is this machine."""
    client = tmp_path / "bin" / "ssh"
    client.parent.mkdir()
    client.write_text('#!/bin/sh\nfor last; do :; done\nexec sh -c "exec $last"\n')
    client.chmod(0o755)

    def start(*arguments, hosts="127.0.0.1:2", **env):
        env["PATH"] = f"{client.parent}:{os.environ['PATH']}"
        return launcher.start("--backend=ssh", f"--hosts={hosts}", *arguments, env=env)

    return start


def test_worker_differs_from_a_local_one_in_its_prefix_only(ssh, launcher, python):
    command = python("""
names = [n for n in os.environ if n.startswith(("DIST_LAUNCH_", "TF_NUM", "OMP_", "NO_PROXY"))]
names = [n for n in names if n not in ("DIST_LAUNCH_HEARTBEAT", "DIST_LAUNCH_TEST")]
print([(n, os.environ[n]) for n in sorted(names)], os.sched_getaffinity(0), os.getcwd(), sys.argv)
print(os.getsid(0) == os.getpid(), signal.getsignal(signal.SIGPIPE), file=sys.stderr)
""")
    remote = launcher.finish(ssh(*command, "it's"))
    local = launcher.run("--workers=2", *command, "it's")
    assert remote.status == local.status == 0
    assert sorted(remote.out.replace(b" 127.0.0.1] ", b"] ").splitlines()) == sorted(
        local.out.splitlines()
    )
    assert remote.err.replace(" 127.0.0.1] ", "] ").count("True") == 2


def test_no_start_has_a_port_of_those_before(ssh, launcher, restarted_twice, lowest_ports):
    # As our code starts it there, `python3 -I -S -c CODE`, it does not look for a sitecustomize.py.
    python = lowest_ports.with_name("python3")
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -c "$(cat {lowest_ports})\n$4"\n')
    python.chmod(0o755)
    command, addresses = restarted_twice
    result = launcher.finish(ssh(f"--remote_python={python}", *command))
    assert result.status == 0, result.err
    assert len(addresses(result)) == len(set(addresses(result))) == 6


def test_addresses_have_free_ports_that_are_kept(ssh, launcher, python):
    source = """
import json, socket
own = int(json.loads(os.environ["TF_CONFIG"])["cluster"]["worker"][INDEX].split(":")[1])
other = socket.socket()
try:
    other.bind(("", own))
except OSError:
    print("kept")
server = socket.socket()
server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
server.bind(("", own))
server.listen()
print("listens")
"""
    result = launcher.finish(ssh(*python(source)))
    assert result.status == 0, result.err
    assert (result.out.count(b"kept"), result.out.count(b"listens")) == (2, 2)


@pytest.mark.parametrize(("end", "status"), [("exit 7", 7), ("kill -KILL $$", 137)])
def test_exit_status_and_signal_come_back(ssh, launcher, end, status):
    script = f"[ $DIST_LAUNCH_INDEX = 1 ] && {{ {end}; }}; exec sleep 60"
    result = launcher.finish(ssh("--", "sh", "-c", script))
    assert result.status == status
    assert re.search(r"worker 1 \(pid \d+ on 127.0.0.1\)", result.err)


TREE = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        open("up-%d" % INDEX, "w").close()
    time.sleep(60)
time.sleep(60)
"""


def test_nothing_outlives_a_launcher_killed_with_sigkill(
    ssh, launcher, python, eventually, tmp_path
):
    process = ssh(*python(TREE))
    eventually(lambda: len(list(tmp_path.glob("up-*"))) == 2)
    process.kill()
    eventually(lambda: launcher.alive() == {}, timeout_s=5)


@pytest.mark.parametrize(
    ("victim", "status", "message"),
    [
        ("relay.py", 137, "worker 1 (pid {}): died with its guard"),
        ("agent", 255, "worker 1 was lost with 127.0.0.1: the connection ended"),
        ("guard", 137, "worker 1 (pid {}): died with its guard"),
    ],
)
def test_killed_link_of_the_chain_ends_the_worker_and_leaves_nothing(
    ssh, launcher, python, eventually, tmp_path, victim, status, message
):
    # The one thing that a killed guard does not remove is the folder of the heartbeat.
    env = {"TMPDIR": str(tmp_path)}
    process = ssh("--nopreflight", "--grace_period_s=1", *python(TREE), **env)
    eventually(lambda: len(list(tmp_path.glob("up-*"))) == 2)
    alive = launcher.alive()
    [worker] = [
        pid
        for pid, command in alive.items()
        if "exec(open(0" in alive.get(parent(pid), "")
        and "exec(open(0" not in command
        and environment(pid)["DIST_LAUNCH_INDEX"] == "1"
    ]
    chain = {"guard": parent(worker), "agent": parent(parent(worker))}
    chain["relay.py"] = parent(chain["agent"])
    assert victim != "relay.py" or victim in alive[chain[victim]]
    os.kill(chain[victim], signal.SIGKILL)
    result = launcher.finish(process)
    assert result.status == status, result.err
    first = result.err.partition("first failure")[2]
    assert message.partition("{}")[0] in first
    assert message.partition("{}")[2].lstrip("):") in first


def parent(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return int(file.read().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def environment(pid):
    with open(f"/proc/{pid}/environ", errors="replace") as file:
        return dict(pair.split("=", 1) for pair in file.read().split("\0") if "=" in pair)


def test_client_that_falls_silent_is_given_up_within_the_bound(
    ssh, launcher, python, eventually, tmp_path
):
    process = ssh("--link_timeout_s=2", "--grace_period_s=1", *python(TREE))
    eventually(lambda: len(list(tmp_path.glob("up-*"))) == 2)
    alive = launcher.alive()
    relays = {pid for pid, command in alive.items() if "relay.py" in command}
    agent = next(pid for pid in alive if parent(pid) in relays)
    os.kill(agent, signal.SIGSTOP)
    begin = time.monotonic()
    result = launcher.finish(process)
    assert result.status == 255
    assert time.monotonic() - begin < 15
    assert "lost with 127.0.0.1: nothing came over the link for 2 s" in result.err


# A kernel whose sockets hold less than ten lines, as they do hundreds of.
SMALL_SOCKETS = """
import socket
real = socket.socketpair

def socketpair(*args):
    pair = real(*args)
    for each in pair:
        each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    return pair

socket.socketpair = socketpair
"""
BEATS_FOR_7_S = """
open("up", "w").close()
for step in range(70):
    with open(os.environ["DIST_LAUNCH_HEARTBEAT"], "w") as file:
        file.write(str(step))
    time.sleep(0.1)
open("done", "w").close()
"""


@pytest.mark.slow
def test_launcher_that_is_stopped_for_long_loses_no_worker(
    ssh, launcher, python, eventually, tmp_path
):
    (tmp_path / "sitecustomize.py").write_text(SMALL_SOCKETS)
    path = f"{tmp_path}:{ROOT}"
    process = ssh(
        *("--link_timeout_s=2", *python(BEATS_FOR_7_S)), hosts="127.0.0.1", PYTHONPATH=path
    )
    eventually((tmp_path / "up").exists)
    process.send_signal(signal.SIGSTOP)
    try:
        eventually((tmp_path / "done").exists, timeout_s=15)
        time.sleep(1)  # its end is to be told later too
    finally:
        process.send_signal(signal.SIGCONT)
    result = launcher.finish(process)
    assert result.status == 0, result.err


@pytest.mark.slow
def test_preflight_ends_within_its_bound_when_nobody_answers(ssh, launcher, tmp_path):
    (tmp_path / "bin" / "ssh").write_text("#!/bin/sh\nexec sleep 60\n")
    begin = time.monotonic()
    result = launcher.finish(ssh("--", "true"), timeout_s=30)
    assert result.status == 2
    assert time.monotonic() - begin < 15
    assert "127.0.0.1: no answer within 10 s; is it up" in result.err


def test_missing_client_command_and_folder_are_usage_errors(ssh, launcher, tmp_path):
    assert launcher.finish(ssh("--", "no-such-command")).status == 127
    (tmp_path / "script").write_text("exit 0\n")
    result = launcher.finish(ssh("--", "./script"))
    assert result.status == 127
    assert "./script is not executable; chmod +x" in result.err
    result = launcher.run("--backend=ssh", "--hosts=n1", "--", "true", env={"PATH": "/no/such"})
    assert result.status == 2
    assert "needs the program ssh" in result.err


def test_profile_that_prints_does_not_disturb(ssh, launcher, tmp_path):
    client = tmp_path / "bin" / "ssh"
    client.write_text(client.read_text().replace("exec", "echo Welcome; echo 42\nexec", 1))
    result = launcher.finish(ssh("--", "echo", "hi"))
    assert result.status == 0, result.err
    assert result.out.count(b"hi") == 2


def test_versions_are_those_of_the_interpreter_that_runs_the_command(tmp_path):
    from launch import survey

    search = f"{tmp_path}:/usr/bin:/bin"
    python = tmp_path / "python3"
    python.symlink_to("/bin/true")
    for first_line, expected in (
        (f"#!{python}\n", str(python)),
        (f"#! {python} -I\n", str(python)),
        ("#!/usr/bin/env python3\n", str(python)),
        (f"#!/bin/sh\n'''exec' {python} \"$0\" \"$@\"\n' '''\n", str(python)),
        (f"#!/bin/sh\n'''exec' \"{tmp_path}/a b\" \"$0\" \"$@\"\n' '''\n", f"{tmp_path}/a b"),
        ("#!/bin/sh\n", None),
        ("\x7fELF", None),
    ):
        script = tmp_path / "script"
        script.write_text(first_line)
        assert survey._interpreter(str(script), search) == expected
    assert survey._interpreter(str(python), search) == str(python)
    assert json.loads(json.dumps(survey._versions("/no/such/python", {}))) == {
        "Python": "/no/such/python does not run"
    }
