"""Cluster: the workers of a run, as pure data."""

import dataclasses
from collections import Counter
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The workers of a run.

    Attributes:
      addresses: 'host:port' of each worker, in the order of their indices; the first is the
        chief's.
      index: which of them this process is.
      gpu_part: (i, n): of the GPUs that this process sees, the i-th of n equal parts is its own,
        and the others belong to the workers beside it. (0, 1): all are its own.
    """

    addresses: tuple[str, ...]
    index: int
    gpu_part: tuple[int, int] = (0, 1)

    @property
    def is_chief(self) -> bool:
        """Whether this worker writes the log, the checkpoints and the exports."""
        return self.index == 0

    def name(self, index: int) -> str:
        """How messages call a worker: 'worker 3 (n7:40123)'."""
        return f"worker {index} ({self.addresses[index]})"


def addresses_of(hosts: Sequence[str], first_port: int) -> tuple[str, ...]:
    """'host:port' of each worker: the workers of one host get ports in a row.

    TensorFlow's server listens on all interfaces whatever its address says, so workers that share a
    host cannot share a port.

    Args:
      hosts: the host of each worker, in the order of their indices.
      first_port: the port of a host's first worker.
    """
    seen: Counter[str] = Counter()
    addresses = []
    for host in hosts:
        addresses.append(f"{host}:{first_port + seen[host]}")
        seen[host] += 1
    return tuple(addresses)
