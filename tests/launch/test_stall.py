"""Workers that go silent."""

import os
import re
import signal

import pytest

pytestmark = pytest.mark.slow

BEATS = """
import faulthandler
faulthandler.register(signal.SIGQUIT)
def beat(step):
    with open(os.environ["DIST_LAUNCH_HEARTBEAT"], "w") as file:
        file.write(str(step))
    open("up-%d-%d" % (INDEX, step), "w").close()
def wait_for_peer():
    while True:
        time.sleep(0.05)
"""


def test_stall_shows_stacks_and_names_who_is_behind(launcher, python):
    source = (
        BEATS
        + """
for step in range(3 if INDEX == 1 else 4):
    beat(step)
    time.sleep(0.6)
wait_for_peer()
"""
    )
    result = launcher.run("--workers=2", "--stall_timeout_s=1.5", *python(source))
    assert result.status == 1
    assert "worker 1 (pid " in result.err.partition("first failure")[2].partition("\n")[0]
    assert "silent for" in result.err
    assert "at step 2 (the furthest is 3)" in result.err
    for index in (0, 1):
        assert re.search(rf"\[worker {index}\]   File .* in wait_for_peer", result.err)


def test_stopped_worker_is_said_to_be_stopped(launcher, python, eventually, tmp_path):
    source = (
        BEATS
        + """
beat(7)
while INDEX == 0 and not os.path.exists("stopped"):
    time.sleep(0.01)
wait_for_peer()
"""
    )
    process = launcher.start("--workers=2", "--stall_timeout_s=1", *python(source))
    eventually(lambda: (tmp_path / "up-1-7").exists())
    [worker] = [
        pid
        for pid, command in launcher.alive().items()
        if "guard.py" not in command and b"DIST_LAUNCH_INDEX=1" in _environ(pid)
    ]
    os.kill(worker, signal.SIGSTOP)
    result = launcher.finish(process)
    assert result.status == 1
    assert f"worker 1 (pid {worker})" in result.err
    assert "its process is stopped (state T)" in result.err


def _environ(pid):
    with open(f"/proc/{pid}/environ", "rb") as file:
        return file.read()


def test_worker_that_never_beats_while_its_peers_do_is_a_failure(launcher, python):
    source = (
        BEATS
        + """
if INDEX == 0:
    for step in range(100):
        beat(step)
        time.sleep(0.1)
time.sleep(60)
"""
    )
    result = launcher.run("--workers=2", "--start_timeout_s=1", *python(source))
    assert result.status == 1
    assert "worker 1" in result.err.partition("first failure")[2].partition("\n")[0]
    assert "has written no heartbeat" in result.err


def test_command_without_heartbeats_is_not_watched(launcher):
    result = launcher.run(
        "--workers=2", "--stall_timeout_s=0.2", "--start_timeout_s=0.2", "--", "sleep", "1.5"
    )
    assert result.status == 0


def test_stacks_do_not_kill_the_shell_around_the_trainer(launcher, python):
    source = BEATS + "beat(1)\nwait_for_peer()"
    command = python(source)[1:]
    result = launcher.run(
        "--workers=1", "--stall_timeout_s=1", "--", "sh", "-c", '"$@"; true', "sh", *command
    )
    assert result.status == 1
    assert "in wait_for_peer" in result.err
    assert "silent for" in result.err


def test_stalled_group_is_restarted(launcher, python):
    source = (
        BEATS
        + """
beat(1)
if os.environ["DIST_LAUNCH_RESTART"] == "0":
    wait_for_peer()
"""
    )
    result = launcher.run("--workers=1", "--max_restarts=1", "--stall_timeout_s=1", *python(source))
    assert result.status == 0


def test_missing_temporary_directory_is_said_and_stops_nothing(launcher):
    result = launcher.run("--workers=1", "--", "echo", "hi", env={"TMPDIR": "/no/such/folder"})
    assert result.status == 0
    assert result.out == b"[worker 0] hi\n"
    assert "not watched for stalls" in result.err
