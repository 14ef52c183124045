"""The local backend: all workers on this machine."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from launch import binding, ports
from launch.job import Host, Job

ADDRESS = "127.0.0.1"


def host(slots: int) -> Host:
    """This machine."""
    return Host(ADDRESS, slots, binding.this_machine())


@contextmanager
def prepared(job: Job) -> Iterator[Job]:
    """Yields the job with free ports, which are kept for the workers meanwhile."""
    former = job.former_ports(job.hosts[0])
    with ports.held(len(job.slots), former, release=job.release_ports) as free:
        yield replace(job, ports=tuple(free))
