"""A whole run: starts a group, says how it ended, and starts it again while the policy says so."""

import select
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from launch import binding, ports, process, report
from launch.group import Group, Limits
from launch.job import INTRAOP, Job, Task
from launch.output import Output
from launch.restart import RestartPolicy
from launch.stop import StopRequests


def supervise(
    job: Job,
    plan: Callable[[Job], list[Task]],
    policy: RestartPolicy,
    limits: Limits,
    output: Output,
) -> int:
    """Runs groups until one is done, the policy gives up or somebody asks to stop.

    Args:
        job: the first start; later ones differ in slots, ports and the number of restarts.
        plan: the backend.
        policy: says whether and how to go on after a failure.
        limits: bounds for each group.
        output: not started yet.

    Returns:
        The exit status for the launcher: 0 done; 75 stopped on request; else the one of the worker
        that failed first, 128 + n for signal n.
    """
    requests = StopRequests()
    process.adopt_orphans()
    output.start()
    try:
        release_ports = False
        while True:
            with ports.held(len(job.slots), release=release_ports) as free:
                job = replace(job, ports=tuple(free))
                tasks = plan(job)
                output.say(f"{_count(job.slots)}: {_describe_places(job, tasks)}")
                ending = Group(tasks, job.environ, limits, output, requests).run()
            status = report.exit_status(ending.ended)
            if status != 0:
                output.say(report.describe(ending.ended))
            following = None if requests.was_asked else policy.after(ending)
            if following is None:
                return status
            output.say(
                f"{following.why}: start again in {following.delay_s:g} s"
                f" with {_count(following.slots)}"
            )
            if _is_asked_within(following.delay_s, requests):
                return report.STOPPED
            job = replace(job, slots=following.slots, restart=job.restart + 1)
            release_ports = following.release_ports
    finally:
        output.drain()


def _count(slots: Sequence[int]) -> str:
    return "1 worker" if len(slots) == 1 else f"{len(slots)} workers"


def _describe_places(job: Job, tasks: list[Task]) -> str:
    workers = [task for task in tasks if task.slot is not None]
    threads = {{**job.environ, **task.env}[INTRAOP]: None for task in workers}
    return binding.describe(job.machine, [task.place for task in workers], ", ".join(threads))


def _is_asked_within(delay_s: float, requests: StopRequests) -> bool:
    deadline = time.monotonic() + delay_s
    while (left := deadline - time.monotonic()) > 0:
        if select.select([requests], [], [], left)[0] and requests.take():
            return True
    return False
