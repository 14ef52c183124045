"""Ports that all workers of a group compute alike, without asking one another."""

from collections.abc import Mapping, Sequence

from dist_train.errors import UsageError

VARIABLE = "DIST_TRAIN_PORT"
# Below the range that Linux hands out to clients (from 32768 on), so that no connection of somebody
# else has the port by chance.
LOWEST = 16384
HIGHEST = 32767
# On one host.
MOST_WORKERS = 128
# Groups whose numbers follow each other, as jobs do, do not overlap with fewer workers a host.
_STRIDE = 97


def first(environ: Mapping[str, str], group: int, hosts: Sequence[str]) -> int:
    """The port of each host's first worker; those beside it have the next ones.

    Args:
      environ: DIST_TRAIN_PORT decides, where it is set.
      group: a number that all workers of the group know and other groups are unlikely to have.
      hosts: the host of each worker.

    Returns:
      A port from 16384 on, such that the last worker's is 32767 at most.

    Raises:
      UsageError: DIST_TRAIN_PORT is no port, or a host has more than 128 workers.
    """
    most = max(hosts.count(host) for host in set(hosts))
    if text := environ.get(VARIABLE):
        if not (text.isdecimal() and text.isascii() and 1 <= int(text) <= 65536 - most):
            raise UsageError(
                f"{VARIABLE}={text}: must be the first of {most} ports that are free on every host,"
                f" a number from 1 to {65536 - most}"
            )
        return int(text)
    if most > MOST_WORKERS:
        raise UsageError(
            f"{most} workers on one host: ports are kept for {MOST_WORKERS};"
            f" set {VARIABLE} to the first of {most} free ports"
        )
    return LOWEST + group * _STRIDE % (HIGHEST + 1 - LOWEST - MOST_WORKERS)
