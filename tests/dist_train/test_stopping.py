import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dist_train import stopping

_ROOT = Path(__file__).parents[2]
_HEAD = """
import os, signal, sys, threading, time
from dist_train import stopping, Stopped
def say(*words):
    print(*words, flush=True)
"""


def _start(code: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", _HEAD + code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(_ROOT)},
    )


def _signalled(code: str, *signals: int, gap_s: float = 0.2) -> tuple[int, str, str]:
    """(status, stdout, stderr) of code that was sent the signals once it said `ready`.

    It can wait for the end of its input: all have been sent then.
    """
    with _start(code) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            for number in signals:
                process.send_signal(number)
                time.sleep(gap_s if len(signals) > 1 else 0)
            process.stdin.close()
            process.stdin = None
            out, err = process.communicate(timeout=20)
        finally:
            process.kill()
    return process.returncode, out, err


_ALL = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]


@pytest.mark.parametrize("number", _ALL)
def test_a_signal_before_anything_began_ends_the_run_on_the_spot(number):
    code = """
try:
    with stopping.listening():
        say("ready")
        time.sleep(60)
except Stopped as error:
    say(error)
    sys.exit(error.exit_status)
"""
    status, out, _ = _signalled(code, number)
    assert status == 75
    assert f"by {number.name} before the first step" in out


@pytest.mark.parametrize("number", _ALL)
def test_a_signal_during_the_run_raises_the_flag_and_nothing_else(number):
    code = """
with stopping.listening() as request:
    asked = threading.Event()
    request.watch_from(asked.set)
    say("ready")
    while not asked.is_set():
        time.sleep(0.01)
    say("asked by", request.signal.name)
"""
    status, out, err = _signalled(code, number)
    assert (status, out) == (0, f"asked by {number.name}\n")
    assert f"{number.name}: stopping after this step" in err


def test_the_flag_is_raised_while_the_main_thread_is_in_c_code():
    # Python's own locks, taken from outside: no signal ends that wait, only the flag does.
    code = """
import ctypes
c = ctypes.CDLL(None)
c.PyThread_allocate_lock.restype = ctypes.c_void_p
lock = ctypes.c_void_p(c.PyThread_allocate_lock())
c.PyThread_acquire_lock(lock, 1)
with stopping.listening() as request:
    request.watch_from(lambda: c.PyThread_release_lock(lock))
    say("ready")
    c.PyThread_acquire_lock(lock, 1)
    say("raised")
"""
    status, out, _ = _signalled(code, signal.SIGTERM)
    assert (status, out) == (0, "raised\n")


@pytest.mark.parametrize(("first", "second"), [(15, 15), (2, 15), (10, 2)])
def test_a_second_signal_leaves_at_once(first, second):
    code = """
with stopping.listening() as request:
    request.watch_from(lambda: say("asked"))
    say("ready")
    time.sleep(60)
"""
    with _start(code) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            process.send_signal(first)
            assert process.stdout.readline() == "asked\n"
            time.sleep(1.2)  # until then it is the same request
            process.send_signal(second)
            assert process.wait(timeout=20) == 128 + second
        finally:
            process.kill()


def test_the_same_request_by_two_ways_is_one_request():
    # A scheduler signals all processes, and the launcher among them passes it on.
    code = """
stopping._SAME_REQUEST_S = 60
with stopping.listening() as request:
    request.watch_from(lambda: None)
    say("ready")
    sys.stdin.read()
    while request.signal is None:
        time.sleep(0.01)
    say("asked by", request.signal.name)
"""
    status, out, err = _signalled(code, signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, gap_s=0.05)
    assert (status, out) == (0, "asked by SIGTERM\n")
    assert err.count("stopping after this step") == 1


def test_a_process_that_cannot_stop_is_ended_within_the_grace_period():
    code = """
with stopping.listening(2.0) as request:
    request.watch_from(lambda: None)
    say("ready")
    threading.Event().wait(60)
"""
    begin = time.monotonic()
    status, _, err = _signalled(code, signal.SIGTERM)
    assert status == 75
    assert time.monotonic() - begin < 10
    assert "within the grace period of 2 s; what was saved before is intact" in err


def test_a_process_that_has_stopped_lives_on():
    code = """
with stopping.listening(2.0) as request:
    asked = threading.Event()
    request.watch_from(asked.set)
    say("ready")
    asked.wait()
time.sleep(2.5)
say("lives")
"""
    status, out, _ = _signalled(code, signal.SIGTERM)
    assert (status, out) == (0, "lives\n")


def test_a_signal_that_came_before_the_flag_existed_is_not_lost():
    code = """
with stopping.listening() as request:
    request.began = True
    say("ready")
    while request.signal is None:
        time.sleep(0.01)
    asked = threading.Event()  # set by either thread, or by both
    request.watch_from(asked.set)
    say(asked.is_set())
"""
    status, out, _ = _signalled(code, signal.SIGTERM)
    assert (status, out) == (0, "True\n")


def test_reclaim_takes_back_a_signal_that_another_has_taken():
    code = """
with stopping.listening() as request:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    request.reclaim()
    asked = threading.Event()
    request.watch_from(asked.set)
    say("ready")
    say(asked.wait(10))
"""
    status, out, _ = _signalled(code, signal.SIGTERM)
    assert (status, out) == (0, "True\n")


def test_signals_are_as_before_afterwards():
    before = [signal.getsignal(number) for number in _ALL]
    threads, descriptors = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with stopping.listening() as request:
            assert [signal.getsignal(number) for number in _ALL] != before
            assert request.signal is None
    assert [signal.getsignal(number) for number in _ALL] == before
    assert signal.set_wakeup_fd(-1) == -1
    assert set(threading.enumerate()) <= threads
    assert len(os.listdir("/proc/self/fd")) <= descriptors


def test_other_signals_ask_for_nothing():
    code = """
with stopping.listening() as request:
    signal.signal(signal.SIGHUP, lambda *_: None)
    request.watch_from(lambda: say("asked"))
    say("ready")
    time.sleep(1)
    say(request.signal)
"""
    status, out, _ = _signalled(code, signal.SIGHUP, signal.SIGHUP)
    assert (status, out) == (0, "None\n")


def test_outside_the_main_thread_nothing_is_changed():
    before = [signal.getsignal(number) for number in _ALL]
    during = []

    def body():
        with stopping.listening() as request:
            request.watch_from(lambda: None)
            request.reclaim()
            during.extend(signal.getsignal(number) for number in _ALL)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert during == before


def test_the_second_messenger_of_a_request_may_come_after_the_end():
    code = """
with stopping.listening() as request:
    request.watch_from(lambda: None)
    say("ready")
    while request.signal is None:
        time.sleep(0.01)
time.sleep(0.5)
say("ended in peace")
time.sleep(0.7)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(5)
"""
    status, out, _ = _signalled(code, signal.SIGTERM, signal.SIGTERM)
    assert (status, out) == (-signal.SIGTERM, "ended in peace\n")
