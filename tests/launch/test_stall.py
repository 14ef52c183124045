"""Workers that go silent."""

import re

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
for step in range(2):
    beat(step)
if INDEX == 0:
    while not os.path.exists("up-1-2"):
        beat(3)
        time.sleep(0.05)
else:
    while not os.path.exists("up-0-3"):
        beat(1)
        time.sleep(0.05)
    beat(2)
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


def test_stopped_worker_is_said_to_be_stopped(launcher, python, tmp_path):
    source = (
        BEATS
        + """
if INDEX == 1:
    with open("pid", "w") as file:
        file.write(str(os.getpid()))
    beat(7)
    os.kill(os.getpid(), signal.SIGSTOP)
while not os.path.exists("up-1-7"):
    beat(7)
    time.sleep(0.05)
wait_for_peer()
"""
    )
    result = launcher.run("--workers=2", "--stall_timeout_s=1", *python(source))
    assert result.status == 1
    assert f"worker 1 (pid {(tmp_path / 'pid').read_text()})" in result.err
    assert "its process is stopped (state T)" in result.err


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
