"""From the flags to a script on stdout, or to a job that is followed to its end."""

import os
import shlex
from collections.abc import Callable, Sequence

from launch import options as common
from launch.slurm import follower, options, script

# What Slurm does in its own way, and how to ask it.
_NOT_HERE = {
    "hosts": "use --slurm_options=--nodelist=n1,n2",
    "hostfile": "use --slurm_options=--nodefile=FILE",
    "env": "Slurm carries the whole environment over, see --slurm_options=--export=...",
    "evaluator": "start `dist-train --mode=follow` as a job of its own",
    "cpu_bind": "use --slurm_options=--cpu-bind=...",
    "start_timeout_s": "give it to dist-train, after the --",
    "stall_timeout_s": "give it to dist-train, after the --",
    "grace_period_s": "Slurm's KillWait is the time between SIGTERM and SIGKILL",
}


def run(command: Sequence[str], *, log_dir: str | None, shows: Callable[[str], bool]) -> int:
    """Prints the script (--dry_run), or submits it and follows the job.

    Args:
        command: the workers'.
        log_dir: for one file per worker; None: there are none.
        shows: from a worker's name whether its output is shown.

    Returns:
        The exit status for the launcher.

    Raises:
        ValueError: the flags do not fit; the text says which one and why.
        client.NotFound: there is no Slurm on this machine.
    """
    for name, remedy in _NOT_HERE.items():
        if common.FLAGS[name].present:
            raise ValueError(f"--{name} has no meaning with --backend=slurm; {remedy}")
    request = _request(command, log_dir)
    text = script.plan(request)
    if common.DRY_RUN.value:
        print(text, end="")
        return 0
    from launch.output import Output

    logs = {}
    if log_dir is not None:
        names = {task: script.log_name(task) for task in range(request.workers)}
        logs = {
            f"worker {task}": os.path.join(request.directory, log_dir, name)
            for task, name in names.items()
        }
    return follower.Follower(logs, Output(shows=shows, log_dir=None)).run(text)


def _request(command: Sequence[str], log_dir: str | None) -> script.Request:
    least, most = common.parse_workers(common.WORKERS.value or "2")
    if least != most:
        raise ValueError(
            f"--workers={common.WORKERS.value}: a Slurm job has one number of tasks; use"
            f" --workers={most}"
        )
    gpus, threads = common.GPUS_PER_WORKER.value, common.THREADS.value
    try:
        further = [word for text in options.OPTIONS.value for word in shlex.split(text)]
    except ValueError as error:
        raise ValueError(f"--slurm_options: {error}; quote as in a shell") from None
    return script.Request(
        command=tuple(command),
        directory=os.getcwd(),
        workers=most,
        max_restarts=common.MAX_RESTARTS.value,
        log_dir=log_dir,
        partition=options.PARTITION.value,
        account=options.ACCOUNT.value,
        time=options.TIME.value,
        nodes=options.NODES.value,
        cpus_per_worker=0 if threads == "auto" else int(threads),
        gpus_per_worker=0 if gpus == "auto" else int(gpus),
        options=tuple(further),
    )
