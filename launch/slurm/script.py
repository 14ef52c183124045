"""The batch script.

srun tells each task who it is; dist-train reads that by itself, so that the script needs no list of
hosts and no ports. The job is requeued, and goes on from its last checkpoint,

- by Slurm: when a node fails, and when it is preempted where preemption requeues;
- by the script, without counting: when the workers have stopped at the time limit (Slurm sends them
  SIGTERM 120 s before it, or up to a minute earlier) or before a preemption;
- by the script, after a failure: up to --max_restarts times in the life of the job. The number is
  kept in the job's comment, since SLURM_RESTART_COUNT counts the others too.
"""

import re
import shlex
from dataclasses import dataclass

from launch.errors import UsageError

# Seconds before the time limit at which the workers are told, and within which their end counts as
# its consequence: Slurm may be a minute early, and a minute is for saving.
_NOTICE_S = 120
_NEAR_LIMIT_S = _NOTICE_S + 120
# Who is asked to stop sooner has not begun: what always ends like this is not started for ever.
_LEAST_S = 10
_OPTION = re.compile(r"-[A-Za-z]\S*|--[a-z][\w-]*(=.*)?")

_BODY = """\
# The tasks get this signal too. What to do is decided when they have ended.
trap : TERM
{prepare}srun {srun}
status=$?
[ $status -eq 0 ] && exit 0

say() {{ echo "dist-launch: job $SLURM_JOB_ID ended with $status: $*" >&2; }}
ask() {{ squeue --noheader --jobs="$SLURM_JOB_ID" --format="$1"; }}

# Otherwise it was cancelled, or Slurm requeues it already.
[ "$(ask %T)" = RUNNING ] || exit $status
end=$(date +%s --date="$(ask %e)" 2> /dev/null || echo 9999999999)
failures=$(ask %k | sed -n 's/^dist-launch failures=\\([0-9]*\\)$/\\1/p')
failures=${{failures:-0}}
near=$((end - $(date +%s) < {near_limit_s} && SECONDS >= {least_s}))
case $status-$near in
75-1 | 137-1 | 143-1)  # 137: srun kills who leaves later than the others
    say "at its time limit or preempted; it is requeued"
    ;;
*)
    if [ "$failures" -ge {max_restarts} ]; then
        say "it is not requeued"
        exit $status
    fi
    failures=$((failures + 1))
    say "restart $failures of {max_restarts}; it is requeued"
    scontrol update JobId="$SLURM_JOB_ID" Comment="dist-launch failures=$failures" || exit $status
    ;;
esac
scontrol requeue "$SLURM_JOB_ID"
exit $status
"""


@dataclass(frozen=True)
class Request:
    """What is asked of Slurm.

    Attributes:
        command: the program and its arguments, the same for all tasks.
        directory: where it runs; the nodes have it too.
        workers: tasks.
        max_restarts: how often it is requeued after a failure.
        log_dir: folder for one file per task; None: all go to the job's own output, with a label.
        partition, account, time: Slurm's options of these names; empty: Slurm's default.
        nodes: how many; 0: as many as Slurm needs.
        cpus_per_worker, gpus_per_worker: 0: Slurm's default.
        options: further options, such as `--mem=4G`; they win over all others.
    """

    command: tuple[str, ...]
    directory: str
    workers: int
    max_restarts: int = 0
    log_dir: str | None = None
    partition: str = ""
    account: str = ""
    time: str = ""
    nodes: int = 0
    cpus_per_worker: int = 0
    gpus_per_worker: int = 0
    options: tuple[str, ...] = ()


def plan(request: Request) -> str:
    """The batch script, for sbatch to read.

    Raises:
        UsageError: a value would break out of its line, or an option is not one of sbatch.
    """
    values = {
        "job-name": "dist-launch",
        "chdir": request.directory,
        "output": "slurm-%j.out",
        "open-mode": "append",
        "signal": f"TERM@{_NOTICE_S}",
        "ntasks": request.workers,
        "nodes": request.nodes,
        "cpus-per-task": request.cpus_per_worker,
        "gpus-per-task": request.gpus_per_worker,
        "partition": request.partition,
        "account": request.account,
        "time": request.time,
    }
    options = [f"--{name}={value}" for name, value in values.items() if value]
    for option in request.options:
        if not _OPTION.fullmatch(option):
            raise UsageError(
                f"--slurm_options: {option!r} is no option of sbatch; write each as --name=value"
            )
    lines = [*options, "--requeue", *request.options]
    for line in lines:
        if not line.isprintable():
            raise UsageError(
                f"{line!r} would not stay on its #SBATCH line; use a value without control"
                " characters"
            )
    head = "".join(f"#SBATCH {shlex.quote(line)}\n" for line in lines)
    return "#!/bin/bash\n" + head + "\n" + _body(request)


def _body(request: Request) -> str:
    # With the TF_CONFIG of the shell that submits, all tasks would be the same worker.
    prepare = ["unset TF_CONFIG", "export PYTHONUNBUFFERED=1"]
    srun = ["--kill-on-bad-exit=1", "--wait=60"]
    if request.cpus_per_worker:  # srun does not take it from the job
        srun.append(f"--cpus-per-task={request.cpus_per_worker}")
    if request.log_dir is None:
        srun.append("--label")
    else:
        prepare.append(shlex.join(["mkdir", "-p", request.log_dir]))
        output = f"{request.log_dir.replace('%', '%%')}/{log_name('%t')}"
        srun += [f"--output={output}", "--open-mode=append"]
    return _BODY.format(
        prepare="".join(line + "\n" for line in prepare),
        srun=shlex.join([*srun, *request.command]),
        near_limit_s=_NEAR_LIMIT_S,
        least_s=_LEAST_S,
        max_restarts=request.max_restarts,
    )


def log_name(task: int | str) -> str:
    """The file of a task in the log folder."""
    return f"worker-{task}.log"
