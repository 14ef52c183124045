"""For the same machines every backend yields the same workers: same order, hosts and indices."""

import functools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_train import environments
from dist_train.environments import mpich, openmpi
from launch.binding import Machine, Shares
from launch.job import Host, Job
from launch.kubernetes import documents, pod
from launch.kubernetes.settings import Settings
from launch.plan import plan

# What a backend makes of machines, [(name, workers)], is the environment of each worker in turn;
# ports are each backend's own.


def launched(machines):
    """local, ssh: TF_CONFIG."""
    count = sum(workers for _, workers in machines)
    hosts = [Host(name, workers, Machine((), math.inf, ())) for name, workers in machines]
    job = Job(
        command=("train",),
        directory="/",
        environ={},
        hosts=tuple(hosts),
        shares=Shares(),
        slots=tuple(range(count)),
        ports=tuple(range(4000, 4000 + count)),
    )
    return [dict(task.env) for task in plan(job)]


def stepped(machines):
    """slurm: srun, whose tasks are laid out in blocks."""
    nodes = [node for node, (_, workers) in enumerate(machines) for _ in range(workers)]
    return [
        {
            "SLURM_JOB_ID": "17",
            "SLURM_STEP_ID": "0",
            "SLURM_STEP_NODELIST": ",".join(name for name, _ in machines),
            "SLURM_STEP_NUM_TASKS": str(len(nodes)),
            "SLURM_STEP_TASKS_PER_NODE": ",".join(str(workers) for _, workers in machines),
            "SLURM_PROCID": str(index),
            "SLURM_NODEID": str(node),
            "SLURM_GTIDS": ",".join(str(i) for i, where in enumerate(nodes) if where == node),
        }
        for index, node in enumerate(nodes)
    ]


def ranked(machines):
    """mpi: Open MPI."""
    hosts = [name for name, workers in machines for _ in range(workers)]
    return [
        {
            "OMPI_COMM_WORLD_SIZE": str(len(hosts)),
            "OMPI_COMM_WORLD_RANK": str(index),
            "PMIX_NAMESPACE": "77",
        }
        for index in range(len(hosts))
    ]


_NAMES = st.lists(st.from_regex(r"[a-z]{1,3}[0-9]{1,3}", fullmatch=True), min_size=1, unique=True)
_MACHINES = _NAMES.flatmap(
    lambda names: st.tuples(*(st.tuples(st.just(name), st.integers(1, 4)) for name in names[:5]))
)


def found(environs, find):
    clusters = [find(environ) for environ in environs]
    assert [cluster.index for cluster in clusters] == list(range(len(clusters)))
    [addresses] = {cluster.addresses for cluster in clusters}
    assert len(set(addresses)) == len(addresses)
    return [address.rpartition(":")[0] for address in addresses]


@pytest.mark.parametrize("backend", [launched, stepped, ranked])
@given(_MACHINES)
def test_workers_are_those_of_the_machines_in_their_order(backend, machines):
    expected = [name for name, workers in machines for _ in range(workers)]
    find = functools.partial(environments.find_cluster, strategy="multi_worker", timeout_s=1.0)
    if backend is ranked:  # what mpirun answers is tested with a real one
        find = functools.partial(openmpi.cluster, timeout_s=1.0, ask=lambda ranks, _: expected)
    assert found(backend(machines), find) == expected


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_pods_are_the_workers_in_the_order_of_their_index(kubelet, workers):
    settings = Settings(kind="job", name="mnist", image="mnist:1", workers=workers)
    job = pod.job(("train",), settings)
    kubelet.secrets["mnist-token"] = {"token": "x"}
    [template] = [
        document["spec"]["template"]
        for document in documents.plan(job, settings)
        if document["kind"] == "Job"
    ]
    environs = [kubelet.environment(template, index) for index in range(workers)]
    find = functools.partial(environments.find_cluster, strategy="multi_worker", timeout_s=1.0)
    assert found(environs, find) == [f"mnist-{index}.mnist" for index in range(workers)]


def test_hydra_and_openmpi_are_not_taken_for_each_other():
    [rank] = ranked((("n1", 1),))
    assert (openmpi.size(rank), mpich.size(rank)) == (1, 0)
