"""The command `dist-launch`: its flags, and what is checked before anything starts."""

import os
import re
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import NoReturn

from absl import flags

_USAGE = """\
dist-launch [flags] -- COMMAND...

Starts COMMAND as a group of workers with TF_CONFIG in their environment, shows their output, stops
all when one fails, says which one failed first, and restarts them if told to.

Exit status: 0 done; 75 stopped on request; 127 no such command; 126 not executable; 2 usage;
else that of the worker that failed first, 128 + n for signal n.

    dist-launch --workers=2 -- dist-train --strategy=multi_worker --workdir=runs/a
"""

# Flags of our own: dist_train has some of the same names, and a test may import both.
_FLAGS = flags.FlagValues()
_FLAGS.set_gnu_getopt(False)  # what follows the command's name belongs to the command

_HELP = flags.DEFINE_bool("help", False, "Show this help.", flag_values=_FLAGS)
_BACKEND = flags.DEFINE_string(
    "backend", "local", "Where the workers run: local is this machine.", flag_values=_FLAGS
)
_WORKERS = flags.DEFINE_string(
    "workers",
    "2",
    "Worker processes in all. MIN:MAX starts MAX, and restarts without a place whose worker fails"
    " first twice without progress, down to MIN; see --max_restarts.",
    flag_values=_FLAGS,
)
_EVALUATOR = flags.DEFINE_bool(
    "evaluator",
    False,
    "Start one more process, with the task type `evaluator`, outside of the cluster. It may fail"
    " without stopping the workers, and has --stall_timeout_s to end after them.",
    flag_values=_FLAGS,
)
_MAX_RESTARTS = flags.DEFINE_integer(
    "max_restarts",
    0,
    "How often the group is restarted after a failure; a minute that got further than before resets"
    " the count. Being stopped on request (75, 143) and losing a port to somebody do not count.",
    lower_bound=0,
    flag_values=_FLAGS,
)
_CPU_BIND = flags.DEFINE_enum(
    "cpu_bind",
    "auto",
    ["auto", "none"],
    "auto: each worker is bound to its own cores, of one NUMA node where that is possible, unless"
    " there are more workers than CPUs; none: no worker is bound.",
    flag_values=_FLAGS,
)
_THREADS = flags.DEFINE_string(
    "threads",
    "auto",
    "Intra-op threads of each worker; auto: as many as it has CPUs, unless the environment already"
    " says (OMP_NUM_THREADS, TF_NUM_INTRAOP_THREADS).",
    flag_values=_FLAGS,
)
_GPUS_PER_WORKER = flags.DEFINE_string(
    "gpus_per_worker",
    "auto",
    "Visible GPUs of each worker, out of CUDA_VISIBLE_DEVICES where it is set; 0: none; auto: an"
    " equal share of all.",
    flag_values=_FLAGS,
)
_START_TIMEOUT_S = flags.DEFINE_float(
    "start_timeout_s",
    120.0,
    "Seconds that a worker has for its first heartbeat from the first one of its peers on.",
    lower_bound=0.1,
    flag_values=_FLAGS,
)
_STALL_TIMEOUT_S = flags.DEFINE_float(
    "stall_timeout_s",
    600.0,
    "Seconds without a heartbeat after which a worker that has written one counts as stalled: the"
    " workers' stacks are shown and the group is stopped as failed.",
    lower_bound=0.1,
    flag_values=_FLAGS,
)
_GRACE_PERIOD_S = flags.DEFINE_float(
    "grace_period_s",
    30.0,
    "Seconds that workers have to save and leave after SIGTERM, before SIGKILL.",
    lower_bound=0.0,
    flag_values=_FLAGS,
)
_LOG_DIR = flags.DEFINE_string(
    "log_dir",
    None,
    "Folder for one file per worker with its raw output, appended to. Default: logs/ in the folder"
    " that the command's own --workdir names; none if it has no --workdir.",
    flag_values=_FLAGS,
)
_TEE = flags.DEFINE_string(
    "tee",
    "all",
    "Whose output is shown: all, none, or worker numbers such as 0,2; `evaluator` is a name too.",
    flag_values=_FLAGS,
)
_QUIET = flags.DEFINE_bool(
    "quiet", False, "Show the launcher's own lines only: --tee=none.", flag_values=_FLAGS
)
_DRY_RUN = flags.DEFINE_bool(
    "dry_run",
    False,
    "Print a line per worker that does the same when pasted into a shell, and start nothing.",
    flag_values=_FLAGS,
)

flags.register_validator(
    "backend",
    lambda value: value == "local",
    "is not available yet: use local",
    flag_values=_FLAGS,
)
flags.register_validator(
    "workers",
    lambda value: _parse_workers(value) != (0, 0),
    "must be a positive number, or MIN:MAX with 1 <= MIN <= MAX",
    flag_values=_FLAGS,
)
flags.register_validator(
    "threads",
    lambda value: value == "auto" or (value.isdecimal() and int(value) > 0),
    "must be auto or a positive number",
    flag_values=_FLAGS,
)
flags.register_validator(
    "gpus_per_worker",
    lambda value: value == "auto" or value.isdecimal(),
    "must be auto, 0 or a positive number",
    flag_values=_FLAGS,
)
flags.register_validator(
    "tee",
    lambda value: (
        value in ("all", "none") or re.fullmatch(r"(\d+|evaluator)(,(\d+|evaluator))*", value)
    ),
    "must be all, none, or worker numbers separated by commas",
    flag_values=_FLAGS,
)


class _UsageError(Exception):
    """The user has to change something; its text is one or two lines."""

    status = 2


class _CommandNotFound(_UsageError):
    status = 127


class _CommandNotExecutable(_UsageError):
    status = 126


def run() -> NoReturn:
    """The console entry point: `dist-launch`, and `python -m launch`."""
    try:
        sys.exit(_main(sys.argv))
    except (_UsageError, flags.Error) as error:
        print(f"dist-launch: {error}", file=sys.stderr)
        sys.exit(getattr(error, "status", 2))
    except KeyboardInterrupt:  # before anything has started
        sys.exit(128 + signal.SIGINT)


def _main(argv: Sequence[str]) -> int:
    command = _FLAGS(argv)[1:]
    if _HELP.value:
        print(_USAGE + _FLAGS.get_help().partition(":")[2])  # without the module's name
        return 0
    if not command:
        raise _UsageError(
            "no command: put it after the flags, as in `dist-launch --workers=2 -- dist-train`"
        )
    if not _DRY_RUN.value:
        _check_command(command[0])

    # Not before: `--help` has no need of them.
    from launch import binding, local, ports
    from launch.job import Host, Job

    min_workers, max_workers = _parse_workers(_WORKERS.value)
    job = Job(
        command=tuple(command),
        directory=os.getcwd(),
        environ=dict(os.environ),
        hosts=(Host(local.ADDRESS, max_workers),),
        machine=binding.this_machine(),
        shares=binding.Shares(
            bind=_CPU_BIND.value == "auto",
            threads=0 if _THREADS.value == "auto" else int(_THREADS.value),
            gpus_per_worker=(
                None if _GPUS_PER_WORKER.value == "auto" else int(_GPUS_PER_WORKER.value)
            ),
        ),
        evaluator=_EVALUATOR.value,
        slots=tuple(range(max_workers)),
    )
    try:
        binding.divide_gpus(job.machine.gpus, max_workers, job.shares.gpus_per_worker)
    except ValueError as error:
        raise _UsageError(str(error)) from error
    if _DRY_RUN.value:
        with ports.held(max_workers) as free:
            for task in local.plan(replace(job, ports=tuple(free))):
                print(task.shell_line())
        return 0

    from launch import supervisor
    from launch.group import Limits
    from launch.output import Output
    from launch.restart import RestartPolicy

    return supervisor.supervise(
        job,
        local.plan,
        RestartPolicy(
            max_workers=max_workers,
            min_workers=min_workers,
            max_restarts=_MAX_RESTARTS.value,
        ),
        Limits(
            start_timeout_s=_START_TIMEOUT_S.value,
            stall_timeout_s=_STALL_TIMEOUT_S.value,
            grace_period_s=_GRACE_PERIOD_S.value,
        ),
        Output(shows=_shows, log_dir=_make_log_dir(command)),
    )


def _shows(name: str) -> bool:
    """Whether the output of `worker 1` or `evaluator` is shown."""
    if _QUIET.value or _TEE.value == "none":
        return False
    return _TEE.value == "all" or name.removeprefix("worker ") in _TEE.value.split(",")


def _make_log_dir(command: Sequence[str]) -> str | None:
    directory = _LOG_DIR.value
    if directory is None:
        workdir = _workdir(command)
        directory = os.path.join(workdir, "logs") if workdir else None
    if directory:
        try:
            os.makedirs(directory, exist_ok=True)
        except OSError as error:
            raise _UsageError(
                f"--log_dir={directory}: {error.strerror}; name a folder that can be written"
            ) from error
    return directory or None


def _workdir(command: Sequence[str]) -> str | None:
    """What `--workdir=X` or `--workdir X` of the command says, the last one as absl has it."""
    found = None
    for argument, following in zip(command, [*command[1:], None], strict=True):
        name, equals, value = argument.partition("=")
        if name in ("--workdir", "-workdir"):
            found = value if equals else following
    return found


def _parse_workers(text: str) -> tuple[int, int]:
    """`4` -> (4, 4), `2:4` -> (2, 4), all else -> (0, 0)."""
    least, colon, most = text.partition(":")
    most = most if colon else least
    if not (least.isdecimal() and most.isdecimal() and 1 <= int(least) <= int(most)):
        return 0, 0
    return int(least), int(most)


def _check_command(name: str) -> None:
    if shutil.which(name):
        return
    if os.path.exists(name) and os.sep in name:
        raise _CommandNotExecutable(
            f"{name} is not executable: chmod +x it, or put its interpreter before it"
        )
    raise _CommandNotFound(f"command not found: {name}")


if __name__ == "__main__":
    run()
