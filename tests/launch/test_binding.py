"""CPUs, threads and GPUs are shared out, on machines that are described in a folder."""

import itertools
import math
import os
import re
from dataclasses import replace

import pytest

from launch import binding
from launch.binding import Cpu, Machine


def machine(nodes=1, cores=4, threads=1, quota=math.inf, gpus=()):
    """`nodes` sockets of `cores` cores with `threads` hardware threads, numbered as Linux does."""
    total = nodes * cores
    return Machine(
        tuple(
            Cpu(number=thread * total + node * cores + core, core=(node, core), node=node)
            for node in range(nodes)
            for core in range(cores)
            for thread in range(threads)
        ),
        quota,
        tuple(gpus),
    )


def shares(machine, workers, bind=True, threads=0):
    places = binding.divide_cpus(machine, workers, bind=bind, threads=threads)
    return [place.cpus for place in places], [place.threads for place in places]


@pytest.mark.parametrize(
    ("machine", "workers", "cpus", "threads"),
    [
        (machine(cores=2), 2, [(0,), (1,)], [1, 1]),
        (machine(cores=4), 1, [(0, 1, 2, 3)], [4]),
        (machine(cores=5), 2, [(0, 1, 2), (3, 4)], [3, 2]),
        # Two threads of one core stay together while there are cores enough.
        (machine(cores=2, threads=2), 2, [(0, 2), (1, 3)], [2, 2]),
        (machine(cores=2, threads=2), 4, [(0,), (2,), (1,), (3,)], [1] * 4),
        # Whole nodes, then nobody on two nodes.
        (machine(nodes=2, cores=2), 2, [(0, 1), (2, 3)], [2, 2]),
        (machine(nodes=4, cores=1), 2, [(0, 1), (2, 3)], [2, 2]),
        (machine(nodes=2, cores=3), 3, [(0, 1), (2,), (3, 4, 5)], [2, 1, 3]),
        # More workers than CPUs, or less time than CPUs: nobody is bound.
        (machine(cores=2), 3, [(), (), ()], [1, 1, 1]),
        (machine(cores=8, quota=4.5), 2, [(), ()], [2, 2]),
        (machine(cores=8, quota=0.5), 2, [(), ()], [1, 1]),
    ],
)
def test_cpus_are_shared_out(machine, workers, cpus, threads):
    assert shares(machine, workers) == (cpus, threads)


@pytest.mark.parametrize("workers", range(1, 17))
@pytest.mark.parametrize("shape", [(1, 16, 1), (2, 8, 1), (2, 4, 2), (4, 2, 2)])
def test_no_cpu_is_given_twice_and_every_worker_gets_one(shape, workers):
    described = machine(*shape)
    cpus, _ = shares(described, workers)
    given = [cpu for share in cpus for cpu in share]
    assert len(given) == len(set(given))
    assert all(cpus)
    nodes = {cpu.number: cpu.node for cpu in described.cpus}
    if workers >= shape[0]:
        assert all(len({nodes[cpu] for cpu in share}) == 1 for share in cpus)


def test_binding_can_be_turned_off_and_threads_be_given():
    assert shares(machine(cores=4), 2, bind=False) == ([(), ()], [2, 2])
    assert shares(machine(cores=4), 2, threads=7) == ([(0, 1), (2, 3)], [7, 7])


def test_machine_is_read_from_sysfs_within_the_affinity(tmp_path):
    for number, (package, core) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        topology = tmp_path / f"sys/devices/system/cpu/cpu{number}/topology"
        topology.mkdir(parents=True)
        (topology / "physical_package_id").write_text(f"{package}\n")
        (topology / "core_id").write_text(f"{core}\n")
    for node, cpus in enumerate(["0-1\n", "2,3\n"]):
        folder = tmp_path / f"sys/devices/system/node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(cpus)
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/cpu.max").write_text("150000 100000\n")
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia1", "nvidiactl"):
        (tmp_path / "dev" / name).touch()

    read = binding.read_machine({1, 2}, {}, tmp_path)
    assert read.cpus == (Cpu(1, (0, 1), 0), Cpu(2, (1, 0), 1))
    assert read.quota == 1.5
    assert read.gpus == ("0", "1")


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "max 100000\n"}, math.inf),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
        ({}, math.inf),
    ],
)
def test_quota_is_read_from_both_kinds_of_cgroups(tmp_path, files, quota):
    for name, text in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert binding.read_machine({0}, {}, tmp_path).quota == quota


@pytest.mark.parametrize(
    ("visible", "gpus"),
    [("2,3", ("2", "3")), ("GPU-ab,GPU-cd", ("GPU-ab", "GPU-cd")), ("0,-1,1", ("0",)), ("", ())],
)
def test_visible_devices_of_the_user_are_respected(tmp_path, visible, gpus):
    assert binding.read_machine({0}, {"CUDA_VISIBLE_DEVICES": visible}, tmp_path).gpus == gpus


@pytest.mark.parametrize(
    ("gpus", "workers", "per_worker", "shares", "left"),
    [
        ("0123", 2, None, [("0", "1"), ("2", "3")], ()),
        ("012", 2, None, [("0",), ("1",)], ("2",)),
        ("0123", 2, 1, [("0",), ("1",)], ("2", "3")),
        ("01", 2, 0, [(), ()], ("0", "1")),
        ("", 2, 0, [(), ()], ()),
        ("", 2, None, [None, None], None),
    ],
)
def test_gpus_are_shared_out(gpus, workers, per_worker, shares, left):
    assert binding.divide_gpus(tuple(gpus), workers, per_worker) == (shares, left)


@pytest.mark.parametrize(
    ("gpus", "workers", "per_worker", "remedy"),
    [
        ("01", 4, None, "--workers=2"),
        ("012", 2, 2, "--workers=1"),
        ("01", 1, 3, "--gpus_per_worker=2"),
        ("012", 4, 5, "--workers=3 --gpus_per_worker=1"),
        ("", 2, 1, "--gpus_per_worker=0"),
    ],
)
def test_too_few_gpus_are_an_error_with_a_remedy(gpus, workers, per_worker, remedy):
    with pytest.raises(ValueError, match=f"; use {remedy}(, or| to train)"):
        binding.divide_gpus(tuple(gpus), workers, per_worker)


@pytest.mark.parametrize("gpus", ["", "0", "01", "012", "0123"])
def test_every_remedy_for_too_few_gpus_helps(gpus):
    for workers, per_worker in itertools.product(range(1, 6), [None, *range(7)]):
        try:
            binding.divide_gpus(tuple(gpus), workers, per_worker)
        except ValueError as error:
            remedies = re.search("; use (.*) to train on the CPU", str(error))[1].split(", or ")
        else:
            continue
        for remedy in remedies:
            flags = {name: int(value) for name, value in re.findall(r"--(\w+)=(\d+)", remedy)}
            fitting = flags.get("workers", workers)
            binding.divide_gpus(tuple(gpus), fitting, flags.get("gpus_per_worker", per_worker))


@pytest.mark.parametrize(
    ("machine", "workers", "text"),
    [
        (machine(cores=4), 2, "2 threads each; CPUs 0-1 | 2-3"),
        (machine(cores=4, gpus="01"), 2, "2 threads each; CPUs 0-1 | 2-3; GPUs 0 | 1"),
        (machine(cores=2, threads=2), 2, "2 threads each; CPUs 0,2 | 1,3"),
        (machine(cores=2), 3, "2 threads each; not bound, they share 2 CPUs"),
        (machine(cores=8, quota=4), 2, "2 threads each; not bound, the cgroup grants 4 of 8 CPUs"),
    ],
)
def test_start_line_says_who_gets_what(machine, workers, text):
    gpus, _ = binding.divide_gpus(machine.gpus, workers, None)
    places = binding.divide_cpus(machine, workers, bind=True, threads=0)
    places = [replace(place, gpus=share) for place, share in zip(places, gpus, strict=True)]
    assert binding.describe(machine, places, "2") == text


SHOWS_ITS_PLACE = """
names = ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")
print(*sorted(os.sched_getaffinity(0)), *(os.environ.get(name) for name in names))
"""
NO_THREADS = {"OMP_NUM_THREADS": None, "TF_NUM_INTRAOP_THREADS": None}


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_real_workers_are_bound_within_the_launchers_affinity(launcher, python):
    first, second = sorted(os.sched_getaffinity(0))[:2]
    os_affinity = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {first, second})
        result = launcher.run("--workers=2", *python(SHOWS_ITS_PLACE), env=NO_THREADS)
        os.sched_setaffinity(0, {second})
        alone = launcher.run("--workers=1", *python(SHOWS_ITS_PLACE), env=NO_THREADS)
    finally:
        os.sched_setaffinity(0, os_affinity)
    assert f"[worker 0] {first} 1 1 1\n".encode() in result.out
    assert f"[worker 1] {second} 1 1 1\n".encode() in result.out
    assert alone.out == f"[worker 0] {second} 1 1 1\n".encode()


def test_threads_of_the_environment_win_over_auto_and_lose_against_the_flag(launcher, python):
    env = {"OMP_NUM_THREADS": "5", "TF_NUM_INTRAOP_THREADS": "6", "TF_NUM_INTEROP_THREADS": "7"}
    auto = launcher.run("--workers=1", *python(SHOWS_ITS_PLACE), env=env)
    assert auto.out.endswith(b" 5 6 7\n")
    assert "1 worker: 6 threads each" in auto.err
    given = launcher.run("--workers=1", "--threads=3", *python(SHOWS_ITS_PLACE), env=env)
    assert given.out.endswith(b" 3 3 7\n")
    assert "1 worker: 3 threads each" in given.err
