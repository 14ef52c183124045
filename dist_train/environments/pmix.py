"""PMIx: asks the process manager for the hosts of all ranks.

The library that every Open MPI comes with talks to the daemon that started this process, over a
socket of this host; the daemons have told each other the layout of the job before any rank runs, so
that nothing waits for another rank. Of its interface three functions and two structures are used,
which have been the same since version 2: `PMIx_Get(proc of a rank, "pmix.hname")`.
"""

import ctypes
import threading
from collections.abc import Callable

from dist_train.errors import RunError, UsageError

_LIBRARIES = ("libpmix.so.2", "libpmix.so")
_SUCCESS = 0
_STRING = 3  # PMIX_STRING
_HOST = b"pmix.hname"  # PMIX_HOSTNAME


class _Proc(ctypes.Structure):
    """pmix_proc_t"""

    _fields_ = (("nspace", ctypes.c_char * 256), ("rank", ctypes.c_uint32))


class _Value(ctypes.Structure):
    """The head of pmix_value_t: the union is larger, but a string is a pointer at its start."""

    _fields_ = (("type", ctypes.c_uint16), ("string", ctypes.c_char_p))


def hosts(ranks: int, timeout_s: float) -> list[str]:
    """The host of each rank of this process's job, as the process manager calls it.

    Raises:
      UsageError: there is no PMIx library.
      RunError: the process manager does not answer, within the bound or at all.
    """
    library = _load()
    answer = _within(timeout_s, lambda: _ask(library, ranks))
    if answer is None:
        raise RunError(
            f"mpirun's daemon on this host did not say where the {ranks} ranks are within"
            f" {timeout_s:g} s; look at mpirun's own messages"
        )
    if isinstance(answer, str):
        raise RunError(f"mpirun's daemon on this host does not say where the ranks are: {answer}")
    return answer


def _load() -> ctypes.CDLL:
    for name in _LIBRARIES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise UsageError(
        f"the ranks are on several hosts, and {_LIBRARIES[0]}, which knows them, is not found; add"
        " its folder to LD_LIBRARY_PATH (Debian: package libpmix2), or use dist-launch with"
        " --backend=ssh"
    )


def _within(timeout_s: float, ask: Callable[[], "list[str] | str"]) -> "list[str] | str | None":
    """What `ask` returns, None at the time-out. C cannot be interrupted, but it can be left."""
    answers: list[list[str] | str] = []
    thread = threading.Thread(target=lambda: answers.append(ask()), daemon=True)
    thread.start()
    thread.join(timeout_s)
    return answers[0] if answers else None


def _ask(library: ctypes.CDLL, ranks: int) -> "list[str] | str":
    """The hosts, or what went wrong."""
    library.PMIx_Error_string.restype = ctypes.c_char_p
    me = _Proc()
    status = library.PMIx_Init(ctypes.byref(me), None, ctypes.c_size_t(0))
    if status != _SUCCESS:
        return f"PMIx_Init: {library.PMIx_Error_string(status).decode()}"
    try:
        found = []
        for rank in range(ranks):
            proc = _Proc(me.nspace, rank)
            value = ctypes.POINTER(_Value)()
            status = library.PMIx_Get(
                ctypes.byref(proc), _HOST, None, ctypes.c_size_t(0), ctypes.byref(value)
            )
            if status != _SUCCESS:
                return f"rank {rank}: {library.PMIx_Error_string(status).decode()}"
            # The value is the library's to free, and of a few bytes: it stays.
            if value.contents.type != _STRING:
                return f"rank {rank}: a host of type {value.contents.type}"
            found.append(value.contents.string.decode())
        return found
    finally:
        library.PMIx_Finalize(None, ctypes.c_size_t(0))
