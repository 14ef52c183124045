"""The flags of `dist-launch`, and what all backends ask of them."""

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence

from absl import flags

from launch.errors import UsageError

# Flags of our own: dist_train has some of the same names, and a test may import both.
FLAGS = flags.FlagValues()
FLAGS.set_gnu_getopt(False)  # what follows the command's name belongs to the command

HELP = flags.DEFINE_bool("help", False, "Show this help.", flag_values=FLAGS)
BACKEND = flags.DEFINE_string(
    "backend",
    "local",
    "Where the workers run: local is this machine; ssh: --hosts or --hostfile; slurm submits a job"
    " and follows it; mpi becomes an mpirun; kubernetes prints a manifest for `kubectl apply -f -`"
    " and starts nothing.",
    flag_values=FLAGS,
)
WORKERS = flags.DEFINE_string(
    "workers",
    None,
    "Worker processes in all; default 2; with hosts, all slots. MIN:MAX starts MAX, and restarts"
    " without a place whose worker is twice the first failure, or whose host is gone, down to MIN;"
    " see --max_restarts.",
    flag_values=FLAGS,
)
HOSTS = flags.DEFINE_string(
    "hosts",
    None,
    "ssh: where workers run, with how many each (1 if not said), as in n1,user@n2:4,[fd00::3]:2.",
    flag_values=FLAGS,
)
HOSTFILE = flags.DEFINE_string(
    "hostfile", None, "ssh: the same as a file, one `name slots=2` a line.", flag_values=FLAGS
)
SSH_USER = flags.DEFINE_string(
    "ssh_user", "", "ssh: whom to log in as; default: as ssh is configured.", flag_values=FLAGS
)
SSH_PORT = flags.DEFINE_integer(
    "ssh_port",
    0,
    "ssh: the port of its server; 0: as ssh is configured.",
    0,
    65535,
    flag_values=FLAGS,
)
SSH_IDENTITY = flags.DEFINE_string(
    "ssh_identity", "", "ssh: a file with a private key.", flag_values=FLAGS
)
SSH_OPTIONS = flags.DEFINE_string(
    "ssh_options",
    "",
    "ssh: further arguments of ssh, quoted as for a shell; they win over ours.",
    flag_values=FLAGS,
)
REMOTE_PYTHON = flags.DEFINE_string(
    "remote_python",
    "python3",
    "ssh: an interpreter on the hosts, 3.10 or newer, that watches over the workers there.",
    flag_values=FLAGS,
)
ENV = flags.DEFINE_multi_string(
    "env",
    [],
    "ssh: further variables to carry over: NAME=value, or names separated by commas. Always:"
    " PATH (before the one there), LD_LIBRARY_PATH, PYTHON*, VIRTUAL_ENV, DIST_TRAIN_*, TF_*,"
    " XLA_*, KERAS_*, OMP_* and the like, NCCL_*, GRPC_*, no_proxy, LANG, LC_*, TZ.",
    flag_values=FLAGS,
)
PREFLIGHT = flags.DEFINE_bool(
    "preflight",
    True,
    "ssh: look before the first start for the working directory, the command, equal versions and"
    " open ports on all hosts, within 10 s for each question.",
    flag_values=FLAGS,
)
LINK_TIMEOUT_S = flags.DEFINE_float(
    "link_timeout_s",
    15.0,
    "ssh: seconds without a sign of life over the network after which a host's workers are given"
    " up here, and killed there.",
    lower_bound=2.0,
    flag_values=FLAGS,
)
OF_SSH = (
    HOSTS, HOSTFILE, SSH_USER, SSH_PORT, SSH_IDENTITY, SSH_OPTIONS, REMOTE_PYTHON, ENV, PREFLIGHT,
    LINK_TIMEOUT_S,
)  # fmt: skip
EVALUATOR = flags.DEFINE_bool(
    "evaluator",
    False,
    "Start one more process, with the task type `evaluator`, outside of the cluster. It may fail"
    " without stopping the workers, and has --stall_timeout_s to end after them.",
    flag_values=FLAGS,
)
MAX_RESTARTS = flags.DEFINE_integer(
    "max_restarts",
    0,
    "How often the group is restarted after a failure; a minute that got further than before resets"
    " the count. Being stopped on request (75, 143) and losing a port to somebody do not count.",
    lower_bound=0,
    flag_values=FLAGS,
)
CPU_BIND = flags.DEFINE_enum(
    "cpu_bind",
    "auto",
    ["auto", "none"],
    "auto: each worker is bound to its own cores, of one NUMA node where that is possible, unless"
    " there are more workers than CPUs; none: no worker is bound.",
    flag_values=FLAGS,
)
THREADS = flags.DEFINE_string(
    "threads",
    "auto",
    "Intra-op threads of each worker; auto: as many as it has CPUs, unless the environment already"
    " says (OMP_NUM_THREADS, TF_NUM_INTRAOP_THREADS).",
    flag_values=FLAGS,
)
GPUS_PER_WORKER = flags.DEFINE_string(
    "gpus_per_worker",
    "auto",
    "Visible GPUs of each worker, out of CUDA_VISIBLE_DEVICES where it is set; 0: none; auto: an"
    " equal share of all.",
    flag_values=FLAGS,
)
START_TIMEOUT_S = flags.DEFINE_float(
    "start_timeout_s",
    120.0,
    "Seconds that a worker has for its first heartbeat from the first one of its peers on.",
    lower_bound=0.1,
    flag_values=FLAGS,
)
STALL_TIMEOUT_S = flags.DEFINE_float(
    "stall_timeout_s",
    600.0,
    "Seconds without a heartbeat after which a worker that has written one counts as stalled: the"
    " workers' stacks are shown and the group is stopped as failed.",
    lower_bound=0.1,
    flag_values=FLAGS,
)
GRACE_PERIOD_S = flags.DEFINE_float(
    "grace_period_s",
    30.0,
    "Seconds that workers have to save and leave after SIGTERM, before SIGKILL.",
    lower_bound=0.0,
    flag_values=FLAGS,
)
LOG_DIR = flags.DEFINE_string(
    "log_dir",
    None,
    "Folder for one file per worker with its raw output, appended to. Default: logs/ in the folder"
    " that the command's own --workdir names; none if it has no --workdir, or a remote one.",
    flag_values=FLAGS,
)
TEE = flags.DEFINE_string(
    "tee",
    "all",
    "Whose output is shown: all, none, or worker numbers such as 0,2; `evaluator` is a name too.",
    flag_values=FLAGS,
)
QUIET = flags.DEFINE_bool(
    "quiet", False, "Show the launcher's own lines only: --tee=none.", flag_values=FLAGS
)
DRY_RUN = flags.DEFINE_bool(
    "dry_run",
    False,
    "Start nothing, and print a line per worker that does the same when pasted into a shell, or the"
    " batch script, the mpirun command or the manifest.",
    flag_values=FLAGS,
)

MPI_OPTIONS = flags.DEFINE_multi_string(
    "mpi_options",
    [],
    "With --backend=mpi: options of mpirun, as in '--hostfile hosts -x PYTHONPATH'; repeatable.",
    flag_values=FLAGS,
)

flags.register_validator(
    "backend",
    lambda value: value in ("local", "ssh", "slurm", "mpi", "kubernetes"),
    "must be local, ssh, slurm, mpi or kubernetes",
    flag_values=FLAGS,
)
flags.register_validator(
    "workers",
    lambda value: value is None or parse_workers(value) != (0, 0),
    "must be a positive number, or MIN:MAX with 1 <= MIN <= MAX",
    flag_values=FLAGS,
)
flags.register_validator(
    "threads",
    lambda value: value == "auto" or (value.isdecimal() and int(value) > 0),
    "must be auto or a positive number",
    flag_values=FLAGS,
)
flags.register_validator(
    "gpus_per_worker",
    lambda value: value == "auto" or value.isdecimal(),
    "must be auto, 0 or a positive number",
    flag_values=FLAGS,
)
flags.register_validator(
    "tee",
    lambda value: (
        value in ("all", "none") or re.fullmatch(r"(\d+|evaluator)(,(\d+|evaluator))*", value)
    ),
    "must be all, none, or worker numbers separated by commas",
    flag_values=FLAGS,
)


def check_backend(
    refused: Mapping[str, Mapping[str, str]], own: Mapping[str, Sequence[flags.FlagHolder]]
) -> None:
    """Checks that the backend takes all the flags that are set.

    Args:
        refused: backend -> flags that have no meaning there -> what to do instead.
        own: backend -> the flags that it alone has.

    Raises:
        UsageError: it does not take one.
    """
    for name, remedy in refused.get(BACKEND.value, {}).items():
        if FLAGS[name].present:
            raise UsageError(f"--{name} has no meaning with --backend={BACKEND.value}; {remedy}")
    for backend, holders in own.items():
        for holder in holders:
            if holder.present and backend != BACKEND.value:
                raise UsageError(f"--{holder.name} needs --backend={backend}")


def fixed_workers(why: str) -> int:
    """The number of workers where it cannot vary.

    Raises:
        UsageError: --workers is MIN:MAX; the text has the reason against it.
    """
    least, most = parse_workers(WORKERS.value or "2")
    if least != most:
        raise UsageError(f"--workers={WORKERS.value}: {why}; use --workers={most}")
    return most


def words(flag: str, texts: Iterable[str]) -> list[str]:
    """The words of a flag's values, as a shell has them.

    Args:
        flag: how errors call it.
        texts: its values.

    Raises:
        UsageError: a quotation has no end.
    """
    try:
        return [word for text in texts for word in shlex.split(text)]
    except ValueError as error:
        raise UsageError(f"{flag}: {error}; quote as in a shell") from None


def parse_workers(text: str) -> tuple[int, int]:
    """`4` -> (4, 4), `2:4` -> (2, 4), all else -> (0, 0)."""
    least, colon, most = text.partition(":")
    most = most if colon else least
    if not (least.isdecimal() and most.isdecimal() and 1 <= int(least) <= int(most)):
        return 0, 0
    return int(least), int(most)
