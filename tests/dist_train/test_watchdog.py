import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]


def _run(body: str) -> subprocess.CompletedProcess:
    code = f"import time, threading, types\nfrom dist_train import watchdog\n{body}"
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=30,
        env={**os.environ, "PYTHONPATH": str(_ROOT)},
    )


def test_a_body_that_hangs_ends_the_process_with_the_message_and_the_stacks():
    begin = time.monotonic()
    done = _run(
        "def waiting_for_a_peer():\n"
        "    threading.Event().wait(60)\n"
        "with watchdog.bound(0.5, 'steps 1 to 9: more than {seconds}; raise --stall_timeout_s'):\n"
        "    waiting_for_a_peer()\n"
    )
    assert time.monotonic() - begin < 20
    assert done.returncode == 1
    *rest, last = done.stderr.splitlines()
    assert last == "error: steps 1 to 9: more than 0.5 s; raise --stall_timeout_s"
    assert any("waiting_for_a_peer" in line for line in rest)


def test_a_stderr_that_is_none_of_the_system_is_no_obstacle():
    done = _run(
        "import io, sys\n"
        "sys.stderr = io.StringIO()\n"
        "with watchdog.bound(0.2, 'more than {seconds}'):\n"
        "    threading.Event().wait(60)\n"
    )
    assert done.returncode == 1
    assert "most recent call first" in done.stderr


def test_a_process_that_knows_more_still_answers_those_who_ask_a_moment_later():
    done = _run(
        "answered = threading.Event()\n"
        "def answer():\n"
        "    print('answered', flush=True)\n"
        "    answered.set()\n"
        "def sleep(seconds):\n"
        "    assert seconds >= 1.0\n"
        "    answered.wait(20)\n"
        "watchdog.time = types.SimpleNamespace(monotonic=time.monotonic, sleep=sleep)\n"
        "def explain():\n"
        "    threading.Timer(0.3, answer).start()\n"
        "    return 'waiting for worker 1'\n"
        "with watchdog.bound(0.2, 'more than {seconds}', explain=explain):\n"
        "    threading.Event().wait(60)\n"
    )
    assert done.returncode == 1
    assert done.stderr.endswith("error: more than 0.2 s (waiting for worker 1)\n")
    assert done.stdout == "answered\n"


def test_a_lock_that_is_never_released_is_no_obstacle():
    done = _run(
        "lock = threading.Lock()\n"
        "lock.acquire()\n"
        "with watchdog.bound(0.3, 'stuck for {seconds}'):\n"
        "    lock.acquire()\n"
    )
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, "error: stuck for 0.3 s")


def test_a_body_that_ends_in_time_goes_on():
    done = _run("with watchdog.bound(1.0, 'late'):\n    pass\ntime.sleep(1.5)\nprint('went on')\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, "went on\n", "")


def test_a_body_that_fails_is_no_longer_bound():
    done = _run(
        "try:\n"
        "    with watchdog.bound(1.0, 'late'):\n"
        "        raise KeyError\n"
        "except KeyError:\n"
        "    time.sleep(1.5)\n"
        "print('went on')\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "went on\n", "")


@pytest.mark.parametrize(("outer", "inner"), [(60.0, 0.3), (0.3, 60.0)])
def test_of_two_bounds_the_earlier_one_counts(outer, inner):
    done = _run(
        f"with watchdog.bound({outer}, 'outer {{seconds}}'):\n"
        "    time.sleep(0.1)\n"
        f"    with watchdog.bound({inner}, 'inner {{seconds}}'):\n"
        "        time.sleep(20)\n"
    )
    which = "outer" if outer < inner else "inner"
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, f"error: {which} 0.3 s")


def test_a_bound_that_comes_after_others_were_kept_counts():
    done = _run(
        "for _ in range(1000):\n"
        "    with watchdog.bound(30.0, 'first'):\n"
        "        pass\n"
        "assert threading.active_count() == 2\n"
        "time.sleep(0.2)\n"
        "with watchdog.bound(0.3, 'second'):\n"
        "    time.sleep(20)\n"
    )
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, "error: second")


def test_a_bound_of_many_days_does_not_keep_the_process():
    done = _run("bound = watchdog.bound(1e6, 'late')\nbound.__enter__()\nprint('end')\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


def test_the_end_of_python_does_not_wait_for_the_lock_of_the_thread_that_is_frozen_then():
    done = _run(
        "bound = watchdog.bound(60, 'late')\n"
        "bound.__enter__()\n"
        "take = watchdog._watch._changed.acquire\n"
        "holder = threading.Thread(target=take, daemon=True)\n"
        "holder.start()\n"
        "holder.join()\n"
        "print('end')\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")
