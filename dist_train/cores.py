"""Cores: how many this process can keep busy.

A container is held to a share of the machine's time (`docker run --cpus`, a limit of Kubernetes),
not to some of its cores. TensorFlow has a thread for each core it sees, which use the share up and
are then stopped, all at once: a small model on one CPU's time of two trains 1.4 times as fast with
one thread.
"""

import math
import os
from pathlib import Path, PurePosixPath


def seen() -> int:
    """Cores in the affinity mask of this process."""
    return len(os.sched_getaffinity(0))


def granted(root: Path = Path("/")) -> int:
    """Whole cores that there is time for: no more than are seen, and at least one.

    Args:
      root: of the file systems in which Linux tells it; another one in tests.
    """
    quota = min(map(_quota, _cgroups(root)))
    return max(1, int(min(seen(), quota)))


def _cgroups(root: Path) -> list[Path]:
    """The folders of the cgroups, of both versions, that this process is in."""
    mount = root / "sys/fs/cgroup"
    folders = [mount, mount / "cpu"]  # a container often sees its own in the place of the root
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return folders
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        folder = mount / "cpu" if controllers else mount
        for name in PurePosixPath(path).parts[1:]:
            folder /= name
            folders.append(folder)
    return folders


def _quota(cgroup: Path) -> float:
    """CPUs' worth of time; inf: no limit, or none that can be read."""
    try:
        if (cgroup / "cpu.max").exists():
            quota, period = (cgroup / "cpu.max").read_text().split()
        else:
            quota = (cgroup / "cpu.cfs_quota_us").read_text()
            period = (cgroup / "cpu.cfs_period_us").read_text()
        return float(quota) / float(period) if float(quota) > 0 else math.inf
    except (OSError, ValueError):  # "max" among them
        return math.inf
