"""The command `dist-launch`: what is checked before anything starts, and the way to a backend."""

import os
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn

from absl import flags

from launch import mpi, options
from launch.errors import CommandNotExecutable, CommandNotFound, UsageError
from launch.kubernetes import options as kubernetes_options
from launch.slurm import options as slurm_options

if TYPE_CHECKING:
    from launch import hosts, supervisor
    from launch.job import Host, Job

_USAGE = """\
dist-launch [flags] -- COMMAND...

Starts COMMAND as a group of workers with TF_CONFIG in their environment, shows their output, stops
all when one fails, says which one failed first, and restarts them if told to.

Exit status: 0 done; 75 stopped on request; 127 no such command; 126 not executable; 2 usage;
255 a worker was lost with its host; else that of the worker that failed first, 128 + n for
signal n.

    dist-launch --workers=2 -- dist-train --strategy=multi_worker --workdir=runs/a
    dist-launch --backend=ssh --hosts=n1,n2 -- dist-train --strategy=multi_worker --workdir=runs/a
    dist-launch --backend=slurm --workers=4 -- dist-train --strategy=multi_worker --workdir=runs/a
    dist-launch --backend=kubernetes --image=mnist:1 -- dist-train ... | kubectl apply -f -
"""
_REFUSED = {
    "kubernetes": kubernetes_options.REFUSED,
    "slurm": slurm_options.REFUSED,
    "mpi": mpi.REFUSED,
}
_OWN = {
    "kubernetes": kubernetes_options.ALL,
    "slurm": slurm_options.ALL,
    "ssh": options.OF_SSH,
    "mpi": (options.MPI_OPTIONS,),
}


def run() -> NoReturn:
    """The console entry point: `dist-launch`, and `python -m launch`."""
    try:
        sys.exit(_main(sys.argv))
    except (UsageError, flags.Error) as error:
        print(f"dist-launch: {error}", file=sys.stderr)
        sys.exit(getattr(error, "status", 2))
    except KeyboardInterrupt:  # before anything has started
        sys.exit(128 + signal.SIGINT)


def _main(argv: Sequence[str]) -> int:
    command = options.FLAGS(argv)[1:]
    if options.HELP.value:
        print(_USAGE + _flags_of(options))
        print("With --backend=kubernetes:\n" + _flags_of(kubernetes_options))
        print("With --backend=slurm:\n" + _flags_of(slurm_options))
        return 0
    if kubernetes_options.PRINT_DOCKERFILE.value:
        from launch.kubernetes import dockerfile

        print(dockerfile.text(sys.version_info[:2]), end="")
        return 0
    if not command:
        raise UsageError(
            "no command: put it after the flags, as in `dist-launch --workers=2 -- dist-train`"
        )
    options.check_backend(_REFUSED, _OWN)
    backend = options.BACKEND.value
    if backend == "kubernetes":
        from launch.kubernetes import command as kubernetes

        kubernetes.run(command)
        return 0
    _check_directory()
    if backend == "slurm":
        from launch.slurm import command as slurm

        return slurm.run(command, log_dir=_log_dir(command), shows=_shows)
    if backend == "mpi":
        return mpi.run(command)
    return _run_ssh(command) if backend == "ssh" else _run_local(command)


# Imports are where they are used: `--help` has no need of them.


def _run_local(command: Sequence[str]) -> int:
    from launch import local, plan

    command = [_located(command[0]), *command[1:]]
    if not options.DRY_RUN.value:
        _check_command(command[0])
    _, max_workers = options.parse_workers(options.WORKERS.value or "2")
    job = _job(command, (local.host(max_workers),), os.environ)
    try:
        plan.divide_gpus(job.hosts[0], job)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if options.DRY_RUN.value:
        with local.prepared(job) as ready:
            for task in plan.plan(ready):
                print(task.shell_line())
        return 0
    return _supervise(job, lambda job, requests, say: local.prepared(job))


def _run_ssh(command: Sequence[str]) -> int:
    from launch import hosts, ssh

    entries = _read_hosts()
    slots = sum(entry.slots for entry in entries)
    min_workers, max_workers = options.parse_workers(options.WORKERS.value or str(slots))
    entries = hosts.fill(entries, max_workers)
    further = options.words(
        f"--ssh_options={options.SSH_OPTIONS.value}", [options.SSH_OPTIONS.value]
    )
    access = ssh.Access(
        options.SSH_USER.value,
        options.SSH_PORT.value,
        options.SSH_IDENTITY.value,
        tuple(further),
        options.REMOTE_PYTHON.value,
        options.LINK_TIMEOUT_S.value,
    )
    try:
        environ = ssh.carried_environment(os.environ, options.ENV.value)
    except KeyError as error:
        raise UsageError(f"--env: {error.args[0]} is not set; set it, or leave it out") from error
    job = _job(command, tuple(ssh.host(entry, access) for entry in entries), environ)
    if options.DRY_RUN.value:
        for line in ssh.dry_run(job):
            print(line)
        return 0
    if not shutil.which("ssh"):
        raise UsageError("--backend=ssh needs the program ssh; install OpenSSH's client")

    def prepare(job, requests, say):
        return ssh.prepared(
            job,
            checks=options.PREFLIGHT.value,
            min_workers=min_workers,
            requests=requests,
            say=say,
        )

    return _supervise(job, prepare)


def _read_hosts() -> "list[hosts.Entry]":
    from launch import hosts

    text, name = options.HOSTS.value, options.HOSTFILE.value
    if (text is None) == (name is None):
        raise UsageError("--backend=ssh needs --hosts=n1,n2:2 or --hostfile=FILE, and not both")
    if text is not None:
        return hosts.parse(text)
    assert name is not None
    try:
        with open(name) as file:
            return hosts.parse_file(file.read(), name)
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UsageError(f"--hostfile={name}: {why}") from error


def _job(command: Sequence[str], hosts: "tuple[Host, ...]", environ: Mapping[str, str]) -> "Job":
    from launch.binding import Shares
    from launch.job import Job

    gpus = options.GPUS_PER_WORKER.value
    return Job(
        command=tuple(command),
        directory=os.getcwd(),
        environ=dict(environ),
        hosts=hosts,
        shares=Shares(
            bind=options.CPU_BIND.value == "auto",
            threads=0 if options.THREADS.value == "auto" else int(options.THREADS.value),
            gpus_per_worker=None if gpus == "auto" else int(gpus),
        ),
        evaluator=options.EVALUATOR.value,
        slots=tuple(range(sum(host.slots for host in hosts))),
    )


def _supervise(job: "Job", prepare: "supervisor.Prepare") -> int:
    from launch import supervisor
    from launch.group import Limits
    from launch.output import Output
    from launch.restart import RestartPolicy

    workers = len(job.slots)
    min_workers, _ = options.parse_workers(options.WORKERS.value or str(workers))
    return supervisor.supervise(
        job,
        prepare,
        RestartPolicy(
            max_workers=workers,
            min_workers=min_workers,
            max_restarts=options.MAX_RESTARTS.value,
        ),
        Limits(
            start_timeout_s=options.START_TIMEOUT_S.value,
            stall_timeout_s=options.STALL_TIMEOUT_S.value,
            grace_period_s=options.GRACE_PERIOD_S.value,
        ),
        Output(shows=_shows, log_dir=_make_log_dir(job.command)),
    )


def _flags_of(module: ModuleType) -> str:
    return options.FLAGS.module_help(module).partition(":")[2]  # without the module's name


def _shows(name: str) -> bool:
    """Whether the output of `worker 1` or `evaluator` is shown."""
    shown = "none" if options.QUIET.value else options.TEE.value
    return shown == "all" or name.removeprefix("worker ") in shown.split(",")


def _make_log_dir(command: Sequence[str]) -> str | None:
    directory = _log_dir(command)
    if directory:
        try:
            os.makedirs(directory, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"--log_dir={directory}: {error.strerror}; name a folder that can be written"
            ) from error
    return directory


def _log_dir(command: Sequence[str]) -> str | None:
    directory = options.LOG_DIR.value
    if directory is None:
        workdir = _workdir(command)
        return os.path.join(workdir, "logs") if workdir and not _is_remote(workdir) else None
    if _is_remote(directory):
        raise UsageError(
            f"--log_dir={directory}: logs are files of the launcher's own; name a folder, or use"
            " --log_dir= for none"
        )
    return directory or None


def _is_remote(path: str) -> bool:
    """Whether it is a store that only the command reaches, such as gs://bucket/run."""
    return "://" in path


def _workdir(command: Sequence[str]) -> str | None:
    """What `--workdir=X` or `--workdir X` of the command says, the last one as absl has it."""
    found = None
    for argument, following in zip(command, [*command[1:], None], strict=True):
        name, equals, value = argument.partition("=")
        if name in ("--workdir", "-workdir"):
            found = value if equals else following
    return found


def _located(name: str) -> str:
    """The command; one that is installed beside this one need not be on the path."""
    beside = os.path.join(os.path.dirname(sys.executable), name)
    is_beside = os.sep not in name and not shutil.which(name) and shutil.which(beside)
    return beside if is_beside else name


def _check_directory() -> None:
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UsageError(
            "the working directory, in which the workers would run, has been deleted; cd to one"
            " that exists"
        ) from None


def _check_command(name: str) -> None:
    if shutil.which(name):
        return
    if os.path.exists(name) and os.sep in name:
        raise CommandNotExecutable(
            f"{name} is not executable: chmod +x it, or put its interpreter before it"
        )
    raise CommandNotFound(f"command not found: {name}")


if __name__ == "__main__":
    run()
