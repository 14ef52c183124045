"""The cluster from what srun, mpirun and mpiexec put into the environment."""

import threading

import pytest

from dist_train import UsageError
from dist_train.environments import find_cluster, openmpi, pmix, port, slurm

STEP = {
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "n[2,10]",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "0",
    "SLURM_GTIDS": "0,1",
}
RANK = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "77",
}


def hosts_of(cluster):
    return [address.rpartition(":")[0] for address in cluster.addresses]


def find(environ):
    return find_cluster(environ, "multi_worker", 1.0)


def test_step_is_the_cluster_in_slurms_order():
    cluster = find(STEP)
    assert hosts_of(cluster) == ["n2", "n2", "n10"]
    assert cluster.index == 1
    ports = [int(address.rpartition(":")[2]) for address in cluster.addresses]
    assert ports == [ports[0], ports[0] + 1, ports[0]]


def test_layout_is_the_one_that_puts_this_task_on_its_node():
    changes = {"SLURM_PROCID": "1", "SLURM_NODEID": "1", "SLURM_GTIDS": "1"}
    assert hosts_of(find({**STEP, **changes})) == ["n2", "n10", "n2"]
    first = {"SLURM_PROCID": "0", "SLURM_GTIDS": "0,2"}
    assert hosts_of(find({**STEP, **first})) == ["n2", "n10", "n2"]


def test_layout_that_was_named_goes_first():
    # A node of one task does not show which it is.
    three = {
        "SLURM_STEP_NODELIST": "n[1-3]",
        "SLURM_STEP_NUM_TASKS": "5",
        "SLURM_STEP_TASKS_PER_NODE": "1,2(x2)",
        "SLURM_PROCID": "0",
        "SLURM_GTIDS": "0",
    }
    assert hosts_of(find({**STEP, **three})) == ["n1", "n2", "n2", "n3", "n3"]
    named = {**STEP, **three, "SLURM_DISTRIBUTION": "cyclic:block"}
    assert hosts_of(find(named)) == ["n1", "n2", "n3", "n2", "n3"]


def test_plane_is_known_by_its_size():
    plane = {
        "SLURM_STEP_NUM_TASKS": "6",
        "SLURM_STEP_TASKS_PER_NODE": "4,2",
        "SLURM_DISTRIBUTION": "plane",
        "SLURM_DIST_PLANESIZE": "2",
        "SLURM_PROCID": "4",
        "SLURM_GTIDS": "0,1,4,5",
    }
    assert hosts_of(find({**STEP, **plane})) == ["n2", "n2", "n10", "n10", "n2", "n2"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"SLURM_GTIDS": "1,2"}, "no block, cyclic or plane layout explains"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, r"SLURM_STEP_\* contradict each other"),
        ({"SLURM_STEP_NODELIST": "n1"}, r"SLURM_STEP_\* contradict each other"),
        ({"SLURM_PROCID": "3"}, r"SLURM_STEP_\* contradict each other"),
        ({"SLURM_STEP_NODELIST": "n[1-"}, "is not a list of nodes"),
        ({"SLURM_STEP_NUM_TASKS": "x"}, "SLURM_STEP_NUM_TASKS is 'x', not a number"),
        ({"SLURM_JOB_ID": ""}, "SLURM_JOB_ID is '', not a number"),
    ],
)
def test_step_that_contradicts_itself_is_an_error_of_one_line(changes, message):
    with pytest.raises(UsageError, match=message) as caught:
        find({**STEP, **changes})
    assert len(str(caught.value).splitlines()) == 1


def test_ports_differ_between_jobs_and_between_steps():
    ids = [("17", "0"), ("17", "1"), ("18", "0"), ("19", "0"), ("17", "2")]
    ports = [
        find({**STEP, "SLURM_JOB_ID": job, "SLURM_STEP_ID": step}).addresses[0] for job, step in ids
    ]
    assert len(set(ports)) == len(ids)


@pytest.mark.parametrize("group", [0, 1, 17, 2**32 - 1, 10**18])
def test_ports_are_in_the_documented_range(group):
    first = port.first({}, group, ["n1"] * port.MOST_WORKERS)
    assert port.LOWEST <= first <= port.HIGHEST + 1 - port.MOST_WORKERS


def test_port_can_be_chosen():
    assert find({**STEP, "DIST_TRAIN_PORT": "5000"}).addresses == ("n2:5000", "n2:5001", "n10:5000")


@pytest.mark.parametrize("text", ["0", "x", "65535", "-1", "²"])
def test_port_that_leaves_no_room_is_an_error(text):
    with pytest.raises(UsageError, match="DIST_TRAIN_PORT"):
        find({**STEP, "DIST_TRAIN_PORT": text})


def test_too_many_workers_on_a_host_are_an_error():
    with pytest.raises(UsageError, match="129 workers on one host"):
        port.first({}, 0, ["n1"] * 129)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({}, (0, 1)),
        ({"SLURM_GPUS_ON_NODE": "4"}, (1, 2)),
        ({"SLURM_GPUS_ON_NODE": "4", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, (1, 2)),
        ({"SLURM_GPUS_ON_NODE": "4", "CUDA_VISIBLE_DEVICES": "2,3"}, (0, 1)),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, (0, 1)),
    ],
)
def test_gpus_are_divided_only_where_every_task_sees_all(changes, part):
    assert find({**STEP, **changes}).gpu_part == part


def test_batch_shell_is_no_step():
    shell = {"SLURM_JOB_ID": "17", "SLURM_PROCID": "0", "SLURM_JOB_NODELIST": "n[1-2]"}
    assert slurm.size(shell) == 0
    assert find_cluster(shell, "default", 1.0) is None
    with pytest.raises(UsageError, match=r"shell of Slurm job 17, not .* put srun before"):
        find(shell)


@pytest.mark.parametrize("strategy", ["default", "mirrored"])
@pytest.mark.parametrize(
    ("environ", "name"), [(STEP, "this Slurm step has 3"), (RANK, "mpirun has 2")]
)
def test_several_processes_are_no_run_of_one(environ, name, strategy):
    with pytest.raises(UsageError, match=f"{name} workers but strategy={strategy}"):
        find_cluster(environ, strategy, 1.0)


def test_one_task_or_rank_is_a_run_of_one():
    task = {
        **STEP,
        "SLURM_STEP_NUM_TASKS": "1",
        "SLURM_STEP_NODELIST": "n2",
        "SLURM_STEP_TASKS_PER_NODE": "1",
    }
    assert find_cluster(task, "default", 1.0) is None
    assert find_cluster({**RANK, "OMPI_COMM_WORLD_SIZE": "1"}, "mirrored", 1.0) is None


def test_tf_config_goes_before_mpirun_and_mpirun_before_the_step_of_its_daemons():
    text = '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 0}}'
    assert hosts_of(find({**STEP, **RANK, "TF_CONFIG": text})) == ["a"]
    assert hosts_of(find({**STEP, **RANK})) == ["127.0.0.1"] * 2


def test_srun_with_pmi_is_a_step():
    pmi = {"PMI_RANK": "1", "PMI_SIZE": "3", "PMI_FD": "9", "PMIX_RANK": "1"}
    assert hosts_of(find({**STEP, **pmi})) == ["n2", "n2", "n10"]


def test_ranks_of_several_hosts_are_asked_for():
    several = {**RANK, "OMPI_COMM_WORLD_SIZE": "3"}
    cluster = openmpi.cluster(several, 5.0, ask=lambda ranks, timeout_s: ["b", "a", "b"])
    assert hosts_of(cluster) == ["b", "a", "b"]
    assert len(set(cluster.addresses)) == 3
    assert cluster.gpu_part == (0, 1)


def test_missing_pmix_library_says_what_to_do(monkeypatch):
    monkeypatch.setattr(pmix, "_LIBRARIES", ("libnowhere.so.2",))
    with pytest.raises(UsageError, match=r"libnowhere.so.2.* is not found; add its folder to"):
        find({**RANK, "OMPI_COMM_WORLD_SIZE": "3"})


def test_question_without_an_answer_ends_at_its_bound():
    never = threading.Event()
    assert pmix._within(0.05, lambda: [str(never.wait(10))]) is None
    never.set()


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"PMIX_RANK": "0"}, "PMIX_RANK=0 without OMPI_COMM_WORLD_SIZE"),
        ({**RANK, "OMPI_COMM_WORLD_RANK": "2"}, "rank 2 of 2"),
        ({**RANK, "PMIX_NAMESPACE": ""}, "neither PMIX_NAMESPACE nor"),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "PMI_RANK is set but not PMI_FD"),
        ({"PMI_RANK": "0", "PMI_SIZE": "2", "PMI_FD": "999"}, "PMI_FD=999 is not mpiexec's socket"),
    ],
)
def test_ranks_that_cannot_be_told_apart_are_an_error_of_one_line(environ, message):
    with pytest.raises(UsageError, match=message) as caught:
        find(environ)
    assert len(str(caught.value).splitlines()) == 1
