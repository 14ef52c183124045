"""Environments: what started this process beside others, and the cluster that they form.

A module for each that can: `tf_config` (any launcher), `openmpi`, `mpich`, `slurm`. Each has a
`NAME` for messages and two functions:

    size(environ) -> int                      how many processes were started together; 0: not by it
    cluster(environ, timeout_s) -> Cluster    who they are; may ask the process manager, in bounds
"""

from collections.abc import Mapping

from dist_train.cluster import Cluster
from dist_train.environments import mpich, openmpi, slurm, tf_config
from dist_train.errors import UsageError

# The first that knows of a group is right: TF_CONFIG was set on purpose, and mpirun's own daemons
# are tasks of a Slurm step when it runs inside a job, so its ranks see the variables of that step.
_ALL = (tf_config, openmpi, mpich, slurm)


def find_cluster(environ: Mapping[str, str], strategy: str, timeout_s: float) -> Cluster | None:
    """The cluster that this process is in, or None for a run of one process.

    Args:
      environ: the process's environment.
      strategy: the strategy that was asked for; it and the environment must fit.
      timeout_s: bound of a question to the process manager, in seconds.

    Raises:
      UsageError: the environment is not usable, or it contradicts the strategy. Never a silent
        single worker, and never four single runs where one of four workers was meant.
      RunError: the process manager does not answer.
    """
    for environment in _ALL:
        size = environment.size(environ)
        if size == 0:
            continue
        if strategy == "multi_worker":
            return environment.cluster(environ, timeout_s)
        if size > 1:
            raise UsageError(
                f"{environment.NAME} has {size} workers but strategy={strategy} trains in one"
                f" process; use --strategy=multi_worker or {environment.ALONE}"
            )
        return None
    if strategy == "multi_worker":
        raise UsageError(_nobody_else(environ))
    return None


def is_evaluator(environ: Mapping[str, str]) -> bool:
    """Whether this process is the evaluator, which is beside the cluster, not in it.

    Raises:
      UsageError: TF_CONFIG is no JSON object.
    """
    return tf_config.is_evaluator(environ)


def _nobody_else(environ: Mapping[str, str]) -> str:
    if job := environ.get("SLURM_JOB_ID"):
        return (
            f"strategy=multi_worker outside of a step: this is the shell of Slurm job {job}, not"
            " one of its tasks; put srun before the command"
        )
    return (
        "strategy=multi_worker needs the workers' addresses in TF_CONFIG, which is not set; start"
        " it with dist-launch, srun or mpirun"
    )
