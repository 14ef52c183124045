"""From the flags to a script on stdout, or to a job that is followed to its end."""

import os
from collections.abc import Callable, Sequence

from launch import options as common
from launch.errors import UsageError
from launch.slurm import follower, options, script


def run(command: Sequence[str], *, log_dir: str | None, shows: Callable[[str], bool]) -> int:
    """Prints the script (--dry_run), or submits it and follows the job.

    Args:
        command: the workers'.
        log_dir: for one file per worker; None: there are none.
        shows: from a worker's name whether its output is shown.

    Returns:
        The exit status for the launcher.

    Raises:
        UsageError: a flag does not fit; the text says which one and why.
        CommandNotFound: there is no Slurm on this machine.
    """
    selects = common.TEE.value not in ("all", "none") and not common.QUIET.value
    if selects and log_dir is None:
        raise UsageError(
            f"--tee={common.TEE.value} needs --log_dir or --workdir: without log files the output"
            " of all workers is one stream"
        )
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

    def shows_also_the_job(name: str) -> bool:
        # Beside log files its own stream has what no worker says: restarts, srun's errors.
        return shows(name) or (selects and name not in logs)

    return follower.Follower(logs, Output(shows=shows_also_the_job, log_dir=None)).run(text)


def _request(command: Sequence[str], log_dir: str | None) -> script.Request:
    gpus, threads = common.GPUS_PER_WORKER.value, common.THREADS.value
    gpus_per_worker = 0 if gpus == "auto" else int(gpus)
    is_without = gpus != "auto" and gpus_per_worker == 0
    # Asked for none, Slurm may still show all. In the task, since srun sets the variable for it.
    hidden = ("env", "CUDA_VISIBLE_DEVICES=-1") if is_without else ()
    return script.Request(
        command=(*hidden, *command),
        directory=os.getcwd(),
        workers=common.fixed_workers("a Slurm job has one number of tasks"),
        max_restarts=common.MAX_RESTARTS.value,
        log_dir=log_dir,
        partition=options.PARTITION.value,
        account=options.ACCOUNT.value,
        time=options.TIME.value,
        nodes=options.NODES.value,
        cpus_per_worker=0 if threads == "auto" else int(threads),
        gpus_per_worker=gpus_per_worker,
        options=tuple(common.words("--slurm_options", options.OPTIONS.value)),
    )
