"""Cores: as many as a container is granted time for, not as many as its machine has."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_train import cores

_SEEN = len(os.sched_getaffinity(0))
_TRAIN = """
import pathlib
import small_run
from absl import logging
logging.set_verbosity(logging.INFO)
small_run.train("run", epochs=1)
names = [path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
print("threads:", sum("Eigen" in name for name in names))
"""


@pytest.mark.parametrize(
    ("files", "granted"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu.max": "400000 100000"}, 4),
        ({"cpu.max": "1600000 100000"}, 8),
        ({"cpu.max": "250000 100000"}, 2),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": ""}, 8),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        # A group of its own within that of the container, or of the session.
        ({"a/b/cpu.max": "200000 100000", "a/cpu.max": "500000 100000", "own": "0::/a/b"}, 2),
        ({"a/b/cpu.max": "max 100000", "a/cpu.max": "500000 100000", "own": "0::/a/b"}, 5),
        (
            {
                "cpu/a/cpu.cfs_quota_us": "600000",
                "cpu/a/cpu.cfs_period_us": "100000",
                "memory/b/cpu.cfs_quota_us": "100000",
                "own": "5:memory:/b\n4:cpu,cpuacct:/a\n0::/",
            },
            6,
        ),
        # The path is one of the host's, which the container does not see.
        ({"cpu.max": "300000 100000", "own": "0::/docker/0123"}, 3),
    ],
)
def test_time_is_granted_by_the_cgroups(tmp_path, monkeypatch, files, granted):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    (tmp_path / "proc/self").mkdir(parents=True)
    for name, text in files.items():
        path = tmp_path / ("proc/self/cgroup" if name == "own" else f"sys/fs/cgroup/{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    assert cores.granted(tmp_path) == granted


@pytest.fixture
def one_cpu():
    """A cgroup with the time of one CPU."""
    name = f"dist-train-test-{os.getpid()}"
    for folder, file, limit in (
        (Path("/sys/fs/cgroup", name), "cpu.max", "100000 100000"),
        (Path("/sys/fs/cgroup/cpu", name), "cpu.cfs_quota_us", "100000"),
    ):
        try:
            folder.mkdir()
        except OSError:
            continue
        if (folder / file).exists():
            (folder / file).write_text(limit)
            yield folder
            time.sleep(0.1)
            folder.rmdir()
            return
        folder.rmdir()
    pytest.skip("needs the right to make a cgroup with a limit of CPU time")


@pytest.mark.skipif(_SEEN == 1, reason="needs two cores")
@pytest.mark.parametrize(
    ("environment", "threads"), [({}, 1), ({"TF_NUM_INTRAOP_THREADS": "2"}, 2)]
)
def test_a_run_has_as_many_threads(tmp_path, one_cpu, environment, threads):
    inherited = {k: v for k, v in os.environ.items() if k != "TF_NUM_INTRAOP_THREADS"}
    enter = f'echo $$ > {one_cpu}/cgroup.procs; exec "$@"'
    result = subprocess.run(
        ["sh", "-c", enter, "sh", sys.executable, "-c", _TRAIN],
        cwd=tmp_path,
        env={**inherited, "PYTHONPATH": str(Path(__file__).parent), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert f"threads: {threads}\n" in result.stdout
    assert f"time for 1 of {_SEEN} cores)" in result.stderr
