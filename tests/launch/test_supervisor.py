"""Restarts of real groups: the count, the ports, the places that are left out."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def test_group_is_restarted_and_done(launcher):
    script = 'echo "restart $DIST_LAUNCH_RESTART"; [ $DIST_LAUNCH_RESTART = 1 ] || exit 3'
    result = launcher.run("--workers=2", "--max_restarts=1", "--", "sh", "-c", script)
    assert result.status == 0
    assert "restart 1 of 1: start again in 1 s with 2 workers" in result.err
    assert result.out.count(b"restart 1") == 2


def test_last_failure_counts_when_restarts_are_used_up(launcher):
    script = "exit $((3 + DIST_LAUNCH_RESTART))"
    result = launcher.run("--workers=1", "--max_restarts=1", "--", "sh", "-c", script)
    assert result.status == 4


def test_no_restart_without_the_flag(launcher):
    result = launcher.run("--workers=1", "--", "sh", "-c", "echo run; exit 3")
    assert result.out.count(b"run") == 1


def test_peers_that_saved_are_restarted_with_the_one_that_failed(launcher, python):
    source = """
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
open(f"up-{INDEX}", "w").close()
if os.environ["DIST_LAUNCH_RESTART"] == "0":
    if INDEX == 1:
        while not os.path.exists("up-0"):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
"""
    result = launcher.run("--workers=2", "--max_restarts=1", *python(source))
    assert result.status == 0
    assert "worker 0: stopped on request, exit status 75" in result.err


@pytest.mark.parametrize("end", ["exit 75", "kill -TERM $$"])
def test_worker_stopped_by_somebody_else_is_restarted_without_counting(launcher, end):
    script = f"""
[ $DIST_LAUNCH_RESTART = 0 ] && {{ {end}; }}
[ $DIST_LAUNCH_RESTART = 1 ] && exit 3
exit 0
"""
    result = launcher.run("--workers=1", "--max_restarts=1", "--", "sh", "-c", script)
    assert result.status == 0
    assert "a worker was stopped on request" in result.err
    assert "restart 1 of 1" in result.err


def test_stop_on_request_is_75_without_restarts(launcher):
    result = launcher.run("--workers=2", "--", "sh", "-c", "exit 75")
    assert result.status == 75
    assert (
        "stopped on request: worker 0, worker 1: stopped on request, exit status 75" in result.err
    )


def test_no_start_has_a_port_of_those_before(launcher, restarted_twice, lowest_ports):
    command, addresses = restarted_twice
    env = {"PYTHONPATH": f"{lowest_ports.parent}:{ROOT}"}
    result = launcher.run("--workers=2", *command, env=env)
    assert result.status == 0, result.err
    assert len(addresses(result)) == len(set(addresses(result))) == 6


TAKES_ITS_PORT = """
import json, socket
config = json.loads(os.environ["TF_CONFIG"])
port = int(config["cluster"]["worker"][INDEX].split(":")[1])
server = socket.socket()
"""


def test_port_taken_between_picking_and_binding_is_retried(launcher, python):
    # The first start finds somebody on its port, who came before it could listen.
    source = (
        TAKES_ITS_PORT
        + """
if os.environ["DIST_LAUNCH_RESTART"] == "0" and INDEX == 1:
    thief = socket.socket()
    thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    thief.bind(("", port))
    thief.listen()
server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
server.bind(("", port))
server.listen()
"""
    )
    result = launcher.run("--workers=2", *python(source))
    assert result.status == 0
    assert "Address already in use" in result.err
    assert "a port was taken: start again in 0 s with 2 workers" in result.err


def test_server_that_cannot_share_its_port_gets_it_at_the_second_start(launcher, python):
    result = launcher.run("--workers=2", *python(TAKES_ITS_PORT + "server.bind(('', port))"))
    assert result.status == 0


def test_port_that_is_always_taken_ends(launcher):
    script = "echo run; echo Address already in use; exit 1"
    result = launcher.run("--workers=1", "--", "sh", "-c", script)
    assert result.status == 1
    assert result.out.count(b"run") == 4


def test_held_port_is_given_to_nobody_else(launcher, python, eventually, tmp_path):
    source = TAKES_ITS_PORT + "open('port', 'w').write(str(port)); time.sleep(60)"
    process = launcher.start("--workers=1", *python(source))
    eventually(lambda: (tmp_path / "port").exists() and (tmp_path / "port").read_text())
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("", int((tmp_path / "port").read_text())))
    process.terminate()
    assert launcher.finish(process).status == 75


def test_place_that_keeps_failing_is_left_out(launcher):
    script = """
echo $DIST_LAUNCH_INDEX of $DIST_LAUNCH_WORKERS
[ $DIST_LAUNCH_LOCAL_INDEX = 1 ] && exit 3
sleep 0.2
"""
    result = launcher.run("--workers=2:3", "--max_restarts=1", "--", "sh", "-c", script)
    assert result.status == 0
    assert "place 1 is left out: start again in 1 s with 2 workers" in result.err
    last = sorted(re.findall(rb"(\d of \d)", result.out)[-2:])
    assert last == [b"0 of 2", b"1 of 2"]


def test_no_place_is_left_out_below_the_minimum(launcher):
    script = "[ $DIST_LAUNCH_LOCAL_INDEX = 1 ] && exit 3; sleep 60"
    result = launcher.run("--workers=2:2", "--max_restarts=1", "--", "sh", "-c", script)
    assert result.status == 3
    assert "left out" not in result.err


def test_fifty_restarts_hold_no_more_files_and_memory_than_a_few(tmp_path):
    source = """
import os, sys
import launch.__main__, launch.restart, launch.supervisor
launch.restart._LONGEST_DELAY_S = 0.01
wait = launch.supervisor._is_asked_within
def look_and_wait(*args):
    with open("/proc/self/statm") as statm, open("held", "a") as held:
        print(len(os.listdir("/proc/self/fd")), statm.read().split()[1], file=held)
    return wait(*args)
launch.supervisor._is_asked_within = look_and_wait
sys.argv = ["dist-launch", "--workers=1", "--max_restarts=50", "--", "sh", "-c", "exit 1"]
launch.__main__.run()
"""
    done = subprocess.run(
        [sys.executable, "-c", source],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1, done.stderr
    lines = (tmp_path / "held").read_text().splitlines()
    files, pages = zip(*(map(int, line.split()) for line in lines), strict=True)
    assert len(files) == 50
    assert max(files[5:]) == min(files[5:])
    assert (pages[-1] - pages[5]) * os.sysconf("SC_PAGE_SIZE") < 1 << 20
