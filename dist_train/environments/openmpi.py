"""Open MPI: the cluster of the ranks that one mpirun (or prterun) has started.

Rank and size are in the environment. The other ranks' hosts are not, unless all are on this one;
then mpirun is asked for them through its PMIx library (see `pmix`), without mpi4py and without
starting MPI.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence

from dist_train.cluster import Cluster, addresses_of
from dist_train.environments import pmix, port
from dist_train.errors import UsageError

NAME = "mpirun"
ALONE = "mpirun -n 1"

_LOOPBACK = "127.0.0.1"


def size(environ: Mapping[str, str]) -> int:
    """How many ranks this mpirun has started; 0: none.

    Raises:
      UsageError: OMPI_COMM_WORLD_SIZE is not a number, or another PMIx launcher does not set it.
    """
    if "OMPI_COMM_WORLD_SIZE" in environ:
        return _number(environ, "OMPI_COMM_WORLD_SIZE")
    # `srun --mpi=pmix` sets PMIX_RANK too; SLURM_* say the rest.
    if "PMIX_RANK" in environ and "SLURM_STEP_NODELIST" not in environ:
        raise UsageError(
            f"PMIX_RANK={environ['PMIX_RANK']} without OMPI_COMM_WORLD_SIZE: some launcher has"
            " started this rank and does not say of how many; use mpirun, or unset PMIX_RANK"
        )
    return 0


def cluster(
    environ: Mapping[str, str],
    timeout_s: float,
    ask: Callable[[int, float], Sequence[str]] = pmix.hosts,
) -> Cluster:
    """The ranks in their order.

    Args:
      environ: what mpirun has given this rank.
      timeout_s: bound of the question to mpirun.
      ask: fn(ranks, timeout_s) -> the host of each; the tests' seam.

    Raises:
      UsageError: the variables cannot be used, or hosts cannot be asked for.
      RunError: mpirun does not answer.
    """
    ranks, index = size(environ), _number(environ, "OMPI_COMM_WORLD_RANK")
    if index >= ranks:
        raise UsageError(f"rank {index} of {ranks}: OMPI_COMM_WORLD_* contradict each other")
    if environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == str(ranks):
        hosts: Sequence[str] = [_LOOPBACK] * ranks
    else:
        hosts = ask(ranks, timeout_s)
    run = environ.get("PMIX_NAMESPACE") or environ.get("OMPI_MCA_ess_base_jobid")
    if not run:
        raise UsageError(
            "neither PMIX_NAMESPACE nor OMPI_MCA_ess_base_jobid is set, which tell one mpirun from"
            " another; start the workers with mpirun and keep its variables"
        )
    # mpirun shows every rank all GPUs. Who has chosen some of them for each rank sets the variable.
    part = (hosts[:index].count(hosts[index]), hosts.count(hosts[index]))
    return Cluster(
        addresses_of(hosts, port.first(environ, zlib.crc32(run.encode()), hosts)),
        index,
        (0, 1) if "CUDA_VISIBLE_DEVICES" in environ else part,
    )


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    if not (text.isdecimal() and text.isascii() and len(text) <= 9):
        raise UsageError(f"{name} is {text[:80]!r}, not a number; start the workers with mpirun")
    return int(text)
