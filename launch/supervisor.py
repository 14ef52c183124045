"""A whole run: starts a group, says how it ended, and starts it again while the policy says so."""

import select
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

from launch import binding, process, report
from launch.contact import Interrupted
from launch.group import Group, Limits
from launch.job import INTRAOP, Job, Task
from launch.output import Output
from launch.plan import plan
from launch.preflight import NotReady
from launch.report import Ended, Ending
from launch.restart import RestartPolicy
from launch.stop import StopRequests

# Starts whose ports are not used again. Workers of an earlier one are long dead.
_REMEMBERED = 10

Prepare = Callable[[Job, StopRequests, Callable[[str], None]], AbstractContextManager[Job]]


def supervise(
    job: Job, prepare: Prepare, policy: RestartPolicy, limits: Limits, output: Output
) -> int:
    """Runs groups until one is done, the policy gives up or somebody asks to stop.

    Args:
        job: the first start; later ones differ in slots, ports and what is said of earlier ones.
        prepare: the backend: from a job to a job with ports, on the hosts that are there.
        policy: says whether and how to go on after a failure.
        limits: bounds for each group.
        output: not started yet.

    Returns:
        The exit status for the launcher: 0 done; 75 stopped on request; else the one of the worker
        that failed first, 128 + n for signal n; or of what keeps the first group from starting.
    """
    requests = StopRequests()
    process.adopt_orphans()
    output.start()
    try:
        while True:
            try:
                with prepare(job, requests, output.say) as ready:
                    former = (*ready.addresses, *job.former)[: _REMEMBERED * len(ready.slots)]
                    job = replace(job, former=former)
                    tasks = plan(ready)
                    output.say(f"{_count(ready.slots)}: {_describe_places(ready, tasks)}")
                    ending = Group(tasks, ready.environ, limits, output, requests).run()
            except NotReady as error:
                if job.restart == 0:
                    output.say(str(error))
                    return error.problems[0].status
                ending = _never_started(job, error)
            except Interrupted:
                output.say("stopped on request, before the workers were started")
                return report.STOPPED
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
            job = replace(
                job,
                slots=following.slots,
                release_ports=following.release_ports,
                restart=job.restart + 1,
            )
    finally:
        output.drain()


def _never_started(job: Job, error: NotReady) -> Ending:
    """The ending of a group whose hosts are not there: their workers are lost before they ran."""
    ended = []
    for problem in {problem.address: problem for problem in error.problems}.values():
        slots = [slot for slot in job.slots if job.host_of(slot).address == problem.address]
        name = f"worker {job.slots.index(slots[0])}"
        end = Ended(name, slots[0], 0, report.LOST, 0.0, host=problem.address, lost=problem.text)
        ended.append(end)
    return Ending(tuple(ended), 0.0, None)


def _count(slots: Sequence[int]) -> str:
    return "1 worker" if len(slots) == 1 else f"{len(slots)} workers"


def _describe_places(job: Job, tasks: list[Task]) -> str:
    described = []
    for host in job.hosts:
        workers = [task for task in tasks if task.slot is not None and task.host == host]
        if not workers or host.machine is None:
            continue
        threads = {{**job.environ, **task.env}[INTRAOP]: None for task in workers}
        places = [task.place for task in workers]
        text = binding.describe(host.machine, places, ", ".join(threads))
        described.append(f"{host.address} {text}" if host.login else text)
    return "; ".join(described)


def _is_asked_within(delay_s: float, requests: StopRequests) -> bool:
    deadline = time.monotonic() + delay_s
    while (left := deadline - time.monotonic()) > 0:
        if select.select([requests], [], [], left)[0] and requests.take():
            return True
    return False
