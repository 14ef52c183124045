import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dist_train import watchdog

_ROOT = Path(__file__).parents[2]


def _run(body: str) -> subprocess.CompletedProcess:
    code = f"import time, threading\nfrom dist_train import watchdog\n{body}"
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
    first, *rest = done.stderr.splitlines()
    assert first == "error: steps 1 to 9: more than 0.5 s; raise --stall_timeout_s"
    assert any("waiting_for_a_peer" in line for line in rest)


def test_a_lock_that_is_never_released_is_no_obstacle():
    done = _run(
        "lock = threading.Lock()\n"
        "lock.acquire()\n"
        "with watchdog.bound(0.3, 'stuck for {seconds}'):\n"
        "    lock.acquire()\n"
    )
    assert (done.returncode, done.stderr.splitlines()[0]) == (1, "error: stuck for 0.3 s")


def test_a_body_that_ends_in_time_goes_on():
    done = _run("with watchdog.bound(0.3, 'late'):\n    pass\ntime.sleep(0.8)\nprint('went on')\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, "went on\n", "")


def test_a_body_that_fails_is_no_longer_bound():
    threads = threading.active_count()
    with pytest.raises(KeyError), watchdog.bound(3600.0, "late"):
        raise KeyError
    deadline = time.monotonic() + 5
    while threading.active_count() > threads:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_bound_of_many_days_does_not_keep_the_process():
    done = _run("bound = watchdog.bound(1e6, 'late')\nbound.__enter__()\nprint('end')\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")
