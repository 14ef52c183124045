"""Slurm: the cluster from the variables that srun gives each task of a step.

TensorFlow's SlurmClusterResolver is not used: it sorts hosts as text (n1, n10, n2), fails without
nvidia-smi, turns GPUs on that were hidden, places the tasks of a cyclic step wrongly and refuses
node lists with several brackets.
"""

from collections.abc import Iterator, Mapping, Sequence

from dist_train.cluster import Cluster, addresses_of
from dist_train.environments import nodelist, port
from dist_train.errors import UsageError

NAME = "this Slurm step"
ALONE = "srun with -n1"

# Steps of one job may run side by side.
_STEP_STRIDE = 41


def size(environ: Mapping[str, str]) -> int:
    """The tasks of this step; 0 outside of one: the batch shell has a job, but no step.

    Raises:
      UsageError: SLURM_STEP_NUM_TASKS is not a number.
    """
    if "SLURM_STEP_NODELIST" not in environ or "SLURM_PROCID" not in environ:
        return 0
    return _number(environ, "SLURM_STEP_NUM_TASKS")


def cluster(environ: Mapping[str, str], timeout_s: float) -> Cluster:
    """The step's tasks, in the order of their ids; nobody needs to be asked.

    Raises:
      UsageError: the variables contradict each other, or the layout of the tasks is not known.
    """
    del timeout_s
    tasks, index = size(environ), _number(environ, "SLURM_PROCID")
    names = nodelist.expand(environ["SLURM_STEP_NODELIST"])
    counts = nodelist.expand_counts(environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    if len(names) != len(counts) or sum(counts) != tasks or not 0 <= index < tasks:
        raise UsageError(
            f"task {index} of {tasks} in a Slurm step of {len(names)} nodes with"
            f" {sum(counts)} tasks on {len(counts)} nodes: SLURM_STEP_* contradict each other;"
            " start the workers with one srun"
        )
    hosts = [names[node] for node in _layout(environ, counts, index)]
    job = _number(environ, "SLURM_JOB_ID") + _STEP_STRIDE * _number(environ, "SLURM_STEP_ID")
    local = hosts[:index].count(hosts[index])
    return Cluster(
        addresses_of(hosts, port.first(environ, job, hosts)),
        index,
        (local, hosts.count(hosts[index])) if _shares_gpus(environ) else (0, 1),
    )


def _layout(environ: Mapping[str, str], counts: Sequence[int], index: int) -> list[int]:
    """The node of each task: the layout that puts this node's tasks where Slurm did.

    SLURM_DISTRIBUTION is looked at first, but it may be the job's and not the step's. A layout that
    fits on every node is the step's; that all tasks found the same one is checked at the
    rendezvous, where they compare their lists of workers.
    """
    node = _number(environ, "SLURM_NODEID")
    # The ids of all tasks on this node.
    gtids = environ.get("SLURM_GTIDS", str(index)).split(",")
    for nodes in _layouts(environ, counts):
        own = [str(task) for task, where in enumerate(nodes) if where == node]
        if set(gtids) <= set(own) and str(index) in own:
            return nodes
    distribution = environ.get("SLURM_DISTRIBUTION", "not set")
    raise UsageError(
        f"task {index} runs on node {node} of the step, which no block, cyclic or plane layout"
        f" explains (SLURM_DISTRIBUTION is {distribution}); use srun --distribution=block"
    )


def _layouts(environ: Mapping[str, str], counts: Sequence[int]) -> Iterator[list[int]]:
    """Possible layouts, the likeliest first; 'block:cyclic' speaks of nodes before the colon."""
    plane_size = environ.get("SLURM_DIST_PLANESIZE", "")
    first = environ.get("SLURM_DISTRIBUTION", "").partition(":")[0].partition(",")[0]
    if first.startswith("plane") and plane_size.isdecimal() and int(plane_size) > 0:
        yield nodelist.plane(counts, int(plane_size))
    if first == "cyclic":
        yield nodelist.cyclic(counts)
    yield nodelist.block(counts)
    yield nodelist.cyclic(counts)


def _shares_gpus(environ: Mapping[str, str]) -> bool:
    """Whether this task sees all GPUs that the step has on this node, as those beside it do.

    With --gpus-per-task or --gpu-bind Slurm shows each task its own, and that is left alone.
    """
    on_node = environ.get("SLURM_GPUS_ON_NODE", "")
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if not on_node.isdecimal():
        return False
    return visible is None or len(visible.split(",")) == int(on_node)


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    if not (text.isdecimal() and text.isascii() and len(text) <= 18):
        raise UsageError(
            f"{name} is {text[:80]!r}, not a number, though SLURM_STEP_NODELIST is set;"
            " start the workers with srun, or unset SLURM_STEP_NODELIST"
        )
    return int(text)
