"""MPICH and what descends from it (Intel MPI, MVAPICH): the ranks of one mpiexec (Hydra).

Each rank puts its host's name into mpiexec's key-value space and reads the others': the PMI-1
protocol, lines of text over a socket that mpiexec leaves open in PMI_FD. No library is needed.
"""

import socket
import time
import zlib
from collections.abc import Callable, Mapping

from dist_train.cluster import Cluster, addresses_of
from dist_train.environments import port
from dist_train.errors import RunError, UsageError

NAME = "mpiexec"
ALONE = "mpiexec -n 1"

_LOOPBACK = "127.0.0.1"


def size(environ: Mapping[str, str]) -> int:
    """How many ranks this mpiexec has started; 0: none.

    srun sets the same variables for its tasks (--mpi=pmi2), whom SLURM_* describe better; but when
    mpiexec uses srun to reach the hosts, both are there, and its own MPI_LOCALNRANKS as well.

    Raises:
      UsageError: PMI_SIZE is not a number.
    """
    if "PMI_RANK" not in environ or "PMI_SIZE" not in environ:
        return 0
    if "SLURM_STEP_NODELIST" in environ and "MPI_LOCALNRANKS" not in environ:
        return 0
    return _number(environ, "PMI_SIZE")


def cluster(environ: Mapping[str, str], timeout_s: float) -> Cluster:
    """The ranks in their order, by the names that their hosts have for themselves.

    Raises:
      UsageError: mpiexec has left no socket, or an unusable one.
      RunError: mpiexec does not answer, or a rank is missing at the time-out.
    """
    ranks, index = size(environ), _number(environ, "PMI_RANK")
    if index >= ranks:
        raise UsageError(f"rank {index} of {ranks}: PMI_RANK and PMI_SIZE contradict each other")
    if "PMI_FD" not in environ:
        raise UsageError(
            "PMI_RANK is set but not PMI_FD, so the ranks' hosts cannot be asked for; start the"
            " workers with mpiexec.hydra, srun or dist-launch"
        )
    own = environ.get("MPIR_CVAR_CH3_INTERFACE_HOSTNAME") or socket.gethostname()
    try:
        with socket.socket(fileno=_number(environ, "PMI_FD")) as connection:
            space, hosts = _exchange(_Dialogue(connection, timeout_s), ranks, index, own)
    except TimeoutError:
        raise RunError(
            f"not all of the {ranks} ranks had said where they are within {timeout_s:g} s; look at"
            " mpiexec's own messages, or raise --start_timeout_s"
        ) from None
    except OSError as error:
        raise UsageError(
            f"PMI_FD={environ['PMI_FD']} is not mpiexec's socket ({error.strerror}): it can be"
            " used once; start the workers with mpiexec, with nothing in between that closes files"
        ) from None
    part = (hosts[:index].count(own), hosts.count(own))
    if len(set(hosts)) == 1:
        hosts = [_LOOPBACK] * ranks
    return Cluster(
        addresses_of(hosts, port.first(environ, zlib.crc32(space.encode()), hosts)),
        index,
        (0, 1) if "CUDA_VISIBLE_DEVICES" in environ else part,
    )


class _Dialogue:
    """Questions and answers in lines of `name=value` words."""

    def __init__(self, connection: socket.socket, timeout_s: float):
        self._connection = connection
        self._deadline = time.monotonic() + timeout_s
        self._unread = b""

    def ask(self, question: str, answer: str) -> dict[str, str]:
        """Sends one and returns the words of its answer, which is to have the name `answer`."""
        self._connection.settimeout(max(0.01, self._deadline - time.monotonic()))
        self._connection.sendall(question.encode() + b"\n")
        while b"\n" not in self._unread:
            self._connection.settimeout(max(0.01, self._deadline - time.monotonic()))
            data = self._connection.recv(4096)
            if not data:
                raise RunError("mpiexec has gone, while the ranks told it where they are")
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        words = dict(
            word.split("=", 1) for word in line.decode(errors="replace").split() if "=" in word
        )
        if words.get("cmd") != answer or words.get("rc", "0") != "0":
            raise RunError(f"mpiexec answers {line[:200]!r} to {question.split()[0]!r}")
        return words


def _exchange(mpiexec: _Dialogue, ranks: int, index: int, own: str) -> tuple[str, list[str]]:
    """The name of the key-value space, which is this mpiexec's alone, and each rank's host."""
    ask: Callable[[str, str], dict[str, str]] = mpiexec.ask
    ask("cmd=init pmi_version=1 pmi_subversion=1", "response_to_init")
    space = ask("cmd=get_my_kvsname", "my_kvsname")["kvsname"]
    ask(f"cmd=put kvsname={space} key=dist_train-{index} value={own}", "put_result")
    ask("cmd=barrier_in", "barrier_out")
    hosts = [
        ask(f"cmd=get kvsname={space} key=dist_train-{rank}", "get_result")["value"]
        for rank in range(ranks)
    ]
    ask("cmd=finalize", "finalize_ack")
    return space, hosts


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    if not (text.isdecimal() and text.isascii() and len(text) <= 9):
        raise UsageError(f"{name} is {text[:80]!r}, not a number; start the workers with mpiexec")
    return int(text)
