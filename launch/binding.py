"""Which CPUs, threads and GPUs each worker gets."""

import math
import os
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

_T = TypeVar("_T")


@dataclass(frozen=True)
class Cpu:
    """A logical CPU, the physical core that it is a thread of, and its NUMA node."""

    number: int
    core: tuple[int, int]  # package, core in the package
    node: int


@dataclass(frozen=True)
class Machine:
    """What this process may use.

    Attributes:
        cpus: the CPUs in its affinity mask.
        quota: the CPUs' worth of time that its cgroup grants; inf: no limit.
        gpus: identifiers of the visible GPUs, as CUDA_VISIBLE_DEVICES has them.
    """

    cpus: tuple[Cpu, ...]
    quota: float
    gpus: tuple[str, ...]


@dataclass(frozen=True)
class Shares:
    """How a machine is to be shared out among workers.

    Attributes:
        bind: whether to bind workers to CPUs, where there are enough.
        threads: intra-op threads of each worker; 0: as many as it has CPUs.
        gpus_per_worker: None: an equal share of all.
    """

    bind: bool = True
    threads: int = 0
    gpus_per_worker: int | None = None


@dataclass(frozen=True)
class Place:
    """What of a machine one process may use.

    Attributes:
        cpus: CPU numbers that it is bound to; empty: not bound.
        threads: intra-op threads; 0: TensorFlow decides.
        gpus: what CUDA_VISIBLE_DEVICES is to list; empty: none; None: the variable stays as it is.
    """

    cpus: tuple[int, ...] = ()
    threads: int = 0
    gpus: tuple[str, ...] | None = None


def read_machine(affinity: Set[int], environ: Mapping[str, str], root: Path = Path("/")) -> Machine:
    """Reads /sys and /dev under `root`."""
    nodes = {
        number: int(path.parent.name.removeprefix("node"))
        for path in root.glob("sys/devices/system/node/node*/cpulist")
        for number in _parse_cpu_list(path.read_text())
    }
    cpus = []
    for number in sorted(affinity):
        topology = root / f"sys/devices/system/cpu/cpu{number}/topology"
        try:
            core = (
                int((topology / "physical_package_id").read_text()),
                int((topology / "core_id").read_text()),
            )
        except OSError:  # some virtual machines do not say: take each for a core
            core = (0, number)
        cpus.append(Cpu(number, core, nodes.get(number, 0)))
    return Machine(tuple(cpus), _read_quota(root / "sys/fs/cgroup"), _visible_gpus(environ, root))


def _parse_cpu_list(text: str) -> list[int]:
    """`0-2,5` -> [0, 1, 2, 5]."""
    numbers: list[int] = []
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            numbers.extend(range(int(first), int(last or first) + 1))
    return numbers


def _read_quota(cgroup: Path) -> float:
    try:
        if (cgroup / "cpu.max").exists():
            quota, period = (cgroup / "cpu.max").read_text().split()
        else:
            quota = (cgroup / "cpu/cpu.cfs_quota_us").read_text()
            period = (cgroup / "cpu/cpu.cfs_period_us").read_text()
        return float(quota) / float(period) if float(quota) > 0 else math.inf
    except (OSError, ValueError):  # no cgroup, or "max"
        return math.inf


def _visible_gpus(environ: Mapping[str, str], root: Path) -> tuple[str, ...]:
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        devices = [p.name for p in root.glob("dev/nvidia*") if re.fullmatch(r"nvidia\d+", p.name)]
        return tuple(str(index) for index in range(len(devices)))
    gpus: list[str] = []
    for gpu in visible.split(","):
        if gpu.strip() in ("", "-1"):  # CUDA ignores what follows an invalid entry
            break
        gpus.append(gpu.strip())
    return tuple(gpus)


def divide_cpus(machine: Machine, workers: int, *, bind: bool, threads: int) -> list[Place]:
    """Gives each worker its share of the CPUs.

    A worker gets whole physical cores where there are enough, of one NUMA node where there are as
    many workers as nodes, and whole nodes where there are fewer. Remaining cores go to the first
    workers of a node: the chief has more to do than the others.

    Args:
        bind: False: no worker is bound. Nor are they when there are more workers than CPUs (two
            would share one while another idles), or when the cgroup grants less time than there
            are CPUs (every container on the machine would crowd on the first ones).
        threads: intra-op threads of each worker; 0: as many as it has CPUs.
    """
    usable = max(1, int(min(len(machine.cpus), machine.quota)))
    shares: list[tuple[int, ...]] = [()] * workers
    if bind and workers <= len(machine.cpus) and machine.quota >= len(machine.cpus):
        shares = _shares(machine.cpus, workers)
    return [
        Place(cpus=share, threads=threads or len(share) or max(1, usable // workers))
        for share in shares
    ]


def _shares(cpus: Sequence[Cpu], workers: int) -> list[tuple[int, ...]]:
    cores: dict[tuple[int, ...], list[int]] = {}
    whole = len({(cpu.node, cpu.core) for cpu in cpus}) >= workers
    for cpu in sorted(cpus, key=lambda cpu: (cpu.node, cpu.core, cpu.number)):
        unit = 0 if whole else cpu.number
        cores.setdefault((cpu.node, *cpu.core, unit), []).append(cpu.number)
    nodes: dict[int, list[list[int]]] = {}
    for key, numbers in cores.items():
        nodes.setdefault(key[0], []).append(numbers)
    node_cores = list(nodes.values())

    if workers <= len(node_cores):
        groups = [[core for node in run for core in node] for run in _split(node_cores, workers)]
    else:
        counts = [0] * len(node_cores)
        for _ in range(workers):  # each to the node that has the most cores a worker left
            best = max(
                range(len(counts)), key=lambda node: len(node_cores[node]) / (counts[node] + 1)
            )
            counts[best] += 1
        groups = [
            part
            for node, count in zip(node_cores, counts, strict=True)
            for part in _split(node, count)
        ]
    return [tuple(sorted(number for core in group for number in core)) for group in groups]


def _split(items: Sequence[_T], parts: int) -> list[list[_T]]:
    """Splits into runs of nearly equal length, longer ones first."""
    runs = []
    rest = list(items)
    for left in range(parts, 0, -1):
        length = -(-len(rest) // left)
        runs.append(rest[:length])
        rest = rest[length:]
    return runs


def divide_gpus(
    gpus: Sequence[str], workers: int, per_worker: int | None
) -> tuple[list[tuple[str, ...] | None], tuple[str, ...] | None]:
    """Gives each worker its GPUs.

    Args:
        gpus: the visible ones.
        per_worker: how many each; 0: none; None: an equal share, and where there are no GPUs at
            all the variable is left alone.

    Returns:
        For each worker its GPUs, and those that are left for an evaluator.

    Raises:
        ValueError: there are too few. TensorFlow takes a GPU's whole memory, so none is shared.
    """
    if per_worker is None and not gpus:
        return [None] * workers, None
    each = len(gpus) // workers if per_worker is None else per_worker
    if each * workers > len(gpus) or (each == 0 and per_worker is None):
        each = max(1, each)
        raise ValueError(
            f"{workers} workers need {each * workers} GPUs and {len(gpus)} are visible;"
            f" use {_remedy(len(gpus), workers, each)}"
        )
    shares = [tuple(gpus[each * index : each * (index + 1)]) for index in range(workers)]
    return list(shares), tuple(gpus[each * workers :])


def _remedy(gpus: int, workers: int, each: int) -> str:
    """The flags nearest to `each` GPUs for each of the workers that so few are enough for."""
    on_cpu = "--gpus_per_worker=0 to train on the CPU"
    if not gpus:
        return on_cpu
    if each <= gpus:
        return f"--workers={gpus // each}, or {on_cpu}"
    fitting = min(workers, gpus)
    fewer = f"--workers={fitting} " if fitting < workers else ""
    return f"{fewer}--gpus_per_worker={gpus // fitting}, or {on_cpu}"


def describe(machine: Machine, places: Sequence[Place], threads: str) -> str:
    """What the start line says about the shares.

    Args:
        machine: what was shared out.
        places: the workers'.
        threads: their numbers of threads, which the user's environment may have decided.
    """
    text = f"{threads} thread{'' if threads == '1' else 's'} each"
    if all(place.cpus for place in places):
        text += "; CPUs " + " | ".join(_format_cpus(place.cpus) for place in places)
    elif len(places) > len(machine.cpus):
        text += f"; not bound, they share {len(machine.cpus)} CPUs"
    elif machine.quota < len(machine.cpus):
        text += f"; not bound, the cgroup grants {machine.quota:g} of {len(machine.cpus)} CPUs"
    if places[0].gpus is not None:
        text += "; GPUs " + " | ".join(",".join(place.gpus or ()) or "none" for place in places)
    return text


def _format_cpus(cpus: Sequence[int]) -> str:
    first, last = cpus[0], cpus[-1]
    if len(cpus) > 1 and last - first == len(cpus) - 1:
        return f"{first}-{last}"
    return ",".join(map(str, cpus))


def this_machine() -> Machine:
    """The machine that this process runs on, within its own affinity and cgroup."""
    return read_machine(os.sched_getaffinity(0), os.environ)
