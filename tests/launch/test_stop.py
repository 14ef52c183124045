"""The launcher is asked to stop, or is killed."""

import fcntl
import os
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SAVES_AND_LEAVES = """
def leave(number, frame):
    print("saved after", number)
    sys.exit(75)
signal.signal(signal.SIGTERM, leave)
signal.signal(signal.SIGINT, leave)
open("up-%d" % INDEX, "w").close()
time.sleep(60)
"""


def _all_up(tmp_path, count):
    return lambda: len(list(tmp_path.glob("up-*"))) == count


def _read_until(process, text):
    said = b""
    while text not in said:
        said = process.stderr.readline()
        assert said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_request_is_forwarded_and_all_leave_with_75(launcher, python, eventually, tmp_path, number):
    process = launcher.start("--workers=2", "--max_restarts=3", *python(SAVES_AND_LEAVES))
    eventually(_all_up(tmp_path, 2))
    process.send_signal(number)
    result = launcher.finish(process)
    assert result.status == 75
    # SIGHUP and SIGUSR1 would end most commands unsaved.
    forwarded = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM
    assert result.out.count(f"saved after {forwarded}".encode()) == 2
    assert "start again" not in result.err


def test_workers_save_when_the_terminal_is_closed(launcher, python, eventually, tmp_path):
    source = SAVES_AND_LEAVES.replace(
        "sys.exit", 'open("saved-%d" % INDEX, "w").close()\n    sys.exit'
    )
    ours, terminal = os.openpty()
    process = launcher.start(
        "--workers=2",
        *python(source),
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(terminal)
    eventually(_all_up(tmp_path, 2))
    os.close(ours)
    assert launcher.finish(process).status == 75
    assert len(list(tmp_path.glob("saved-*"))) == 2


def test_second_ctrl_c_kills_at_once(launcher, python, eventually, tmp_path):
    source = """
signal.signal(signal.SIGINT, lambda *_: open("asked-%d" % INDEX, "w").close())
open("up-%d" % INDEX, "w").close()
while True:
    time.sleep(1)
"""
    process = launcher.start("--workers=2", "--grace_period_s=60", *python(source))
    eventually(_all_up(tmp_path, 2))
    process.send_signal(signal.SIGINT)
    eventually(lambda: len(list(tmp_path.glob("asked-*"))) == 2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    result = launcher.finish(process)
    assert result.status == 137
    assert "killed by SIGKILL from the launcher, as Ctrl-C came again" in result.err


# To dist-train, a second one is an order to leave unsaved.
NOTES_SIGNALS = """
asked = []
def ask(number, frame):
    asked.append(number)
    open("asked-%d" % INDEX, "w").close()
signal.signal(signal.SIGTERM, ask)
signal.signal(signal.SIGINT, ask)
open("up-%d" % INDEX, "w").close()
while not os.path.exists("finish"):
    time.sleep(0.01)
print("asked by", asked)
sys.exit(75)
"""


def test_request_within_a_stop_sends_no_second_signal(launcher, python, eventually, tmp_path):
    fails = """
if INDEX == 1:
    while not os.path.exists("up-0"):
        time.sleep(0.01)
    sys.exit(3)
"""
    source = fails + NOTES_SIGNALS
    process = launcher.start("--workers=2", "--max_restarts=3", *python(source))
    eventually((tmp_path / "asked-0").exists)  # since worker 1 has failed
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT):
        process.send_signal(number)
    _read_until(process, b"SIGINT: the workers are stopping already; Ctrl-C again kills them")
    (tmp_path / "finish").touch()
    result = launcher.finish(process)
    assert b"asked by [15]" in result.out
    assert result.status == 3
    assert "start again" not in result.err


def test_ctrl_c_after_another_request_kills_when_it_comes_again(
    launcher, python, eventually, tmp_path
):
    process = launcher.start("--workers=2", "--grace_period_s=60", *python(NOTES_SIGNALS))
    eventually(_all_up(tmp_path, 2))
    process.terminate()
    eventually(lambda: len(list(tmp_path.glob("asked-*"))) == 2)
    process.send_signal(signal.SIGINT)
    _read_until(process, b"Ctrl-C again kills them at once")
    process.send_signal(signal.SIGINT)
    result = launcher.finish(process)
    assert result.status == 137
    assert "killed by SIGKILL from the launcher, as Ctrl-C came again" in result.err


def test_second_sigterm_leaves_the_grace_period_alone(launcher, python, eventually, tmp_path):
    # Schedulers send several, a while before the end.
    source = """
def leave(number, frame):
    open("asked-%d" % INDEX, "w").close()
    time.sleep(1)
    sys.exit(75)
signal.signal(signal.SIGTERM, leave)
open("up-%d" % INDEX, "w").close()
time.sleep(60)
"""
    process = launcher.start("--workers=2", *python(source))
    eventually(_all_up(tmp_path, 2))
    process.terminate()
    eventually(lambda: len(list(tmp_path.glob("asked-*"))) == 2)
    process.terminate()
    assert launcher.finish(process).status == 75


def test_worker_that_ignores_the_request_is_killed_and_named(launcher, eventually, tmp_path):
    script = """
[ $DIST_LAUNCH_INDEX = 1 ] && trap '' TERM
touch up-$DIST_LAUNCH_INDEX
exec sleep 60
"""
    process = launcher.start("--workers=2", "--grace_period_s=0.5", "--", "sh", "-c", script)
    eventually(_all_up(tmp_path, 2))
    process.terminate()
    result = launcher.finish(process)
    assert result.status == 137
    assert "worker 1 (pid " in result.err
    assert "it did not stop in time" in result.err


def test_ctrl_c_of_a_terminal_reaches_workers_once(launcher, python, eventually, tmp_path):
    # A terminal signals the whole foreground group; workers are in sessions of their own.
    source = SAVES_AND_LEAVES
    process = launcher.start("--workers=2", *python(source), start_new_session=True)
    eventually(_all_up(tmp_path, 2))
    os.killpg(process.pid, signal.SIGINT)
    result = launcher.finish(process)
    assert result.status == 75
    assert result.out.count(b"saved after 2") == 2


def test_stopped_worker_still_obeys(launcher, python, eventually, tmp_path):
    process = launcher.start("--workers=2", *python(SAVES_AND_LEAVES))
    eventually(_all_up(tmp_path, 2))
    worker = max(pid for pid, command in launcher.alive().items() if "guard.py" not in command)
    os.kill(worker, signal.SIGSTOP)
    process.terminate()
    assert launcher.finish(process).status == 75


GROWS_A_TREE = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGHUP, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        open("up-%d" % INDEX, "w").close()
        time.sleep(60)
    time.sleep(60)
time.sleep(60)
"""


def test_nothing_outlives_a_launcher_killed_with_sigkill(launcher, python, eventually, tmp_path):
    source = GROWS_A_TREE.replace("signal.SIG_IGN", 'lambda *_: open("asked", "w").close()')
    process = launcher.start("--workers=2", *python(source))
    eventually(_all_up(tmp_path, 2))
    assert len(launcher.alive()) == 9  # the launcher, and for each worker a guard and three more
    process.kill()
    eventually(lambda: launcher.alive() == {})
    assert not (tmp_path / "asked").exists()  # at once


def test_nothing_is_left_in_the_temporary_directory(launcher, python, eventually, tmp_path):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    process = launcher.start("--workers=2", *python(GROWS_A_TREE), env={"TMPDIR": str(temporary)})
    eventually(_all_up(tmp_path, 2))
    assert len(list(temporary.iterdir())) == 2
    process.kill()
    eventually(lambda: list(temporary.iterdir()) == [])
    eventually(lambda: launcher.alive() == {})


def test_request_between_two_lines_of_the_start_is_kept():
    source = """
import signal
from launch.stop import StopRequests
real = signal.signal
def install(number, handler):
    real(number, handler)
    signal.raise_signal(number)
signal.signal = install
print(sorted(StopRequests().take()))
"""
    done = subprocess.run(
        [sys.executable, "-c", source], env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "[1, 2, 10, 15]\n", "")


def test_request_during_the_start_ends_everything(launcher):
    for delay_s in (0.0, 0.05, 0.1, 0.15, 0.2):
        process = launcher.start("--workers=8", "--", "sleep", "60")
        time.sleep(delay_s)
        process.terminate()
        assert launcher.finish(process).status in (75, -signal.SIGTERM)  # before, after handlers
        assert launcher.alive() == {}


def test_nothing_outlives_a_launcher_killed_during_the_start(launcher, eventually):
    for delay_s in (0.05, 0.08, 0.1, 0.12, 0.14, 0.16, 0.2):
        process = launcher.start("--workers=8", "--", "sleep", "60")
        time.sleep(delay_s)
        process.kill()
        launcher.finish(process)
        eventually(lambda: launcher.alive() == {})


def test_request_while_waiting_to_restart_ends_the_wait(launcher):
    # Three failures: the third wait is 4 s long.
    process = launcher.start("--workers=1", "--max_restarts=9", "--", "sh", "-c", "exit 1")
    _read_until(process, b"start again in 4 s")
    process.terminate()
    result = launcher.finish(process)
    assert result.status == 75
    assert "1 worker:" not in result.err  # no further start
    assert result.seconds < 3
