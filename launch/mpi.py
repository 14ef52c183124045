"""The MPI backend: one mpirun, which starts, watches and stops the ranks.

mpirun tells each rank who it is; dist-train reads that by itself. The launcher becomes mpirun, so
that signals, output and exit status are mpirun's own.
"""

import os
import shlex
import shutil
from collections.abc import Mapping, Sequence

from launch import options
from launch.errors import CommandNotFound

# What mpirun does in its own way, or not at all.
REFUSED = {
    "hosts": "use --mpi_options='--host n1:2,n2:2'",
    "hostfile": "use --mpi_options='--hostfile FILE'",
    "env": "use --mpi_options='-x NAME'",
    "evaluator": "start `dist-train --mode=follow` beside it",
    "max_restarts": "start it again by hand, or use --backend=ssh or slurm",
    "cpu_bind": "use --mpi_options=--bind-to=...",
    "threads": "set TF_NUM_INTRAOP_THREADS",
    "gpus_per_worker": "the ranks of a host share its GPUs equally; or set CUDA_VISIBLE_DEVICES",
    "start_timeout_s": "give it to dist-train, after the --",
    "stall_timeout_s": "give it to dist-train, after the --",
    "log_dir": "use --mpi_options=--output-filename=...",
    "tee": "use --mpi_options=--output-filename=...",
    "quiet": "use --mpi_options=--output-filename=...",
}
# Open MPI kills what has not ended so long after SIGTERM; its own default, a second, is little for
# saving. It waits as long before the SIGTERM, and always to the end: also when a rank has failed.
_GRACE_S = 5.0


def plan(
    command: Sequence[str], workers: int, further: Sequence[str], environ: Mapping[str, str]
) -> list[str]:
    """The mpirun command line.

    Args:
        command: the ranks'.
        workers: how many ranks.
        further: options of mpirun.
        environ: of the shell that it is started from.
    """
    # With the shell's own TF_CONFIG, all ranks would be the same worker.
    clean = ["env", "--unset=TF_CONFIG"] if "TF_CONFIG" in environ else []
    return [*clean, "mpirun", "-n", str(workers), *further, *command]


def run(command: Sequence[str]) -> int:
    """Prints the command line (--dry_run), or becomes it.

    Returns:
        The exit status for the launcher, if this is still the launcher.

    Raises:
        UsageError: a flag does not fit; the text says which one and why.
        CommandNotFound: there is no mpirun.
    """
    workers = options.fixed_workers("mpirun has one number of ranks")
    further = options.words("--mpi_options", options.MPI_OPTIONS.value)
    line = plan(command, workers, further, os.environ)
    grace_s = options.GRACE_PERIOD_S.value if options.GRACE_PERIOD_S.present else _GRACE_S
    grace = {"OMPI_MCA_odls_base_sigkill_timeout": f"{grace_s:.0f}"}
    if options.DRY_RUN.value:
        print(shlex.join(["env", *(f"{name}={value}" for name, value in grace.items()), *line]))
    elif shutil.which("mpirun"):
        os.execvpe(line[0], line, {**os.environ, **grace})
    else:
        raise CommandNotFound("command not found: mpirun; install Open MPI or MPICH")
    return 0
