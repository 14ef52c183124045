"""The ssh backend: workers on other machines, each in an ssh connection of its own."""

import json
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from launch import plan, preflight, remote
from launch.binding import Cpu, Machine
from launch.contact import Contacts
from launch.hosts import Entry
from launch.job import Host, Job, Login
from launch.preflight import NotReady, Problem
from launch.stop import StopRequests

# For the answers to one question.
_ANSWER_S = 10.0
# The last two end a client whose relay was killed and whose link is cut.
_OPTIONS = (
    "-T",
    "-oBatchMode=yes",
    "-oLogLevel=ERROR",
    "-oConnectTimeout=5",
    "-oServerAliveInterval=5",
    "-oServerAliveCountMax=3",
)
# Carried over with the job. What belongs to one machine is not: CUDA_VISIBLE_DEVICES, HOME, TMPDIR.
_CARRIED = re.compile(
    r"(TF|XLA|KERAS|DIST_TRAIN|OMP|KMP|MKL|OPENBLAS|NCCL|GRPC|LC)_\w+"
    r"|PATH|LD_LIBRARY_PATH|PYTHON\w+|VIRTUAL_ENV|LANG|TZ|no_proxy|NO_PROXY"
)
# Its values are not shown by --dry_run.
_SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|KEY", re.IGNORECASE)
# Of a dry run, which asks no host for free ones.
_FIRST_PORT = 20000


@dataclass(frozen=True)
class Access:
    """How to log in, as the flags have it.

    Attributes:
        user, port, identity: empty or 0: as ssh's own configuration says.
        options: further arguments of ssh; they win over ours.
        python: an interpreter there that runs our agent.
        link_timeout_s: see `launch.job.Login`.
    """

    user: str = ""
    port: int = 0
    identity: str = ""
    options: tuple[str, ...] = ()
    python: str = "python3"
    link_timeout_s: float = 15.0


def host(entry: Entry, access: Access) -> Host:
    """A host of a list, with the command that leads there."""
    command = ["ssh", *access.options, *_OPTIONS]
    if access.port:
        command += ["-p", str(access.port)]
    if access.identity:
        command += ["-i", access.identity]
    if user := entry.user or access.user:
        command += ["-l", user]
    command += ["--", entry.address.strip("[]")]
    login = Login(tuple(command), access.python, access.link_timeout_s)
    return Host(entry.address, entry.slots, login=login)


def carried_environment(environ: Mapping[str, str], wanted: Sequence[str]) -> dict[str, str]:
    """The variables that go with the job.

    Args:
        environ: the launcher's own.
        wanted: further ones: `NAME=value`, or names separated by commas.

    Raises:
        KeyError: a name is not set.
    """
    found = {name: value for name, value in environ.items() if _CARRIED.fullmatch(name)}
    found.pop("TF_CONFIG", None)
    for entry in wanted:
        name, equals, value = entry.partition("=")
        if equals:
            found[name] = value
        else:
            found |= {name: environ[name] for name in entry.split(",")}
    return found


def dry_run(job: Job) -> Iterator[str]:
    """A line per worker that does the same when pasted into a shell.

    Free ports, CPUs and GPUs are asked of the hosts at a start, and here they are not asked.
    Variables whose names sound like secrets are only named.
    """
    ports = tuple(_FIRST_PORT + slot for slot in job.slots)
    secrets = [name for name in job.environ if _SECRET.search(name)]
    shown = {
        name: value
        for name, value in job.environ.items()
        if name not in secrets and name not in ("PATH", "no_proxy", "NO_PROXY")
    }
    if "PATH" in job.environ:  # here it replaces the one there
        shown["PATH"] = job.environ["PATH"]
    if secrets:
        yield f"# not shown, but carried over: {', '.join(secrets)}"
    for task in plan.plan(replace(job, ports=ports)):
        yield task.shell_line(shown)


@contextmanager
def prepared(
    job: Job,
    *,
    checks: bool,
    min_workers: int,
    requests: StopRequests,
    say: Callable[[str], None],
) -> Iterator[Job]:
    """Yields the job with what the hosts say of themselves: machines, free ports, who is there.

    Args:
        job: a start of it.
        checks: whether to check, at the first start, that the workers can run there.
        min_workers: if so many workers are left, a host that does not answer is left out; at a
            restart, every host with a problem.
        requests: to stop.
        say: shows a line to the user.

    Raises:
        NotReady: hosts have problems.
        Interrupted: there is a request to stop.
    """
    checks = checks and job.restart == 0
    with Contacts[str](requests, _ANSWER_S) as contacts:
        ready, problems = _survey(job, contacts, checks, say)
        if checks and not [each for each in problems if not each.is_absent]:
            problems += _try_ports(ready, contacts)
        if problems:
            may_go_on = job.restart > 0 or all(each.is_absent for each in problems)
            if not may_go_on or len(ready.slots) < min_workers:
                raise NotReady(problems)
            for problem in problems:
                say(f"left out: {problem}")
        message = json.dumps({"release": job.release_ports}).encode() + b"\n"
        contacts.ask({host.address: message for host in _used(ready)}, {})
        yield ready


def _used(job: Job) -> list[Host]:
    return list(dict.fromkeys(job.host_of(slot) for slot in job.slots))


def _survey(
    job: Job, contacts: Contacts[str], checks: bool, say: Callable[[str], None]
) -> tuple[Job, list[Problem]]:
    """Returns the job as far as the hosts have answered and have no problem, and the problems."""
    used = _used(job)
    payloads = {
        host.address: remote.survey_payload(
            job, host, ports=[job.host_of(slot) for slot in job.slots].count(host), checks=checks
        )
        for host in used
    }
    before = time.time()
    surveys = contacts.ask(payloads, {host.address: host.login for host in used if host.login})
    after = time.time()
    surveys = {host.address: surveys[host.address] for host in used if host.address in surveys}
    problems = []
    for host in used:
        if host.address not in surveys and host.login:
            by_hand = shlex.join([each for each in host.login.ssh if each not in _OPTIONS])
            complaint = contacts.complaints[host.address]
            problems.append(preflight.unreachable(host.address, complaint, by_hand))
    if checks:
        clocks = {address: (each["time"], before, after) for address, each in surveys.items()}
        for warning in preflight.clock_warnings(clocks):
            say(warning)
        problems += preflight.problems(surveys, job.command[0], job.directory)
    ports = {address: list(survey["ports"]) for address, survey in surveys.items()}
    hosts = []
    for host in job.hosts:
        if host.address in surveys:
            host = replace(host, machine=_machine(surveys[host.address]["machine"]))
            try:
                plan.divide_gpus(host, job)
            except ValueError as error:
                problems.append(Problem(host.address, str(error)))
        hosts.append(host)
    bad = {problem.address for problem in problems}
    slots = tuple(slot for slot in job.slots if job.host_of(slot).address not in bad)
    free = tuple(ports[job.host_of(slot).address].pop(0) for slot in slots)
    return replace(job, hosts=tuple(hosts), slots=slots, ports=free), problems


def _try_ports(job: Job, contacts: Contacts[str]) -> list[Problem]:
    """Whether each worker's port can be reached from each other host."""
    addresses = {host.address for host in _used(job)}
    if len(addresses) < 2:
        return []
    messages = {}
    for address in addresses:
        others = [
            (job.host_of(slot).address, port)
            for slot, port in zip(job.slots, job.ports, strict=True)
            if job.host_of(slot).address != address
        ]
        messages[address] = json.dumps({"connect": others}).encode() + b"\n"
    answers = contacts.ask(messages, {})
    problems = preflight.closed_ports({a: each["unreachable"] for a, each in answers.items()})
    silent = f"no answer within {_ANSWER_S:g} s to the trial of its ports; use --nopreflight"
    return problems + [Problem(address, silent) for address in addresses - answers.keys()]


def _machine(fields: Mapping) -> Machine:
    cpus = tuple(Cpu(cpu["number"], tuple(cpu["core"]), cpu["node"]) for cpu in fields["cpus"])
    return Machine(cpus, fields["quota"], tuple(fields["gpus"]))
