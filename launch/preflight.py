"""Preflight: judges from what the hosts say of themselves whether the workers can run there."""

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Nothing here depends on equal clocks, but who reads the logs of two hosts side by side does.
_CLOCK_S = 5.0
_MISSING_COMMAND = 127


@dataclass(frozen=True)
class Problem:
    """Why a host cannot be used.

    Attributes:
        address: the host.
        text: what is wrong, and what to do.
        status: the exit status that goes with it.
        is_absent: it does not answer; an elastic run may go on without it.
    """

    address: str
    text: str
    status: int = 2
    is_absent: bool = False

    def __str__(self) -> str:
        return f"{self.address}: {self.text}"


class NotReady(Exception):
    """Too few hosts can be used.

    Attributes:
        problems: what is wrong with the others.
    """

    def __init__(self, problems: Sequence[Problem]):
        super().__init__("\n".join(map(str, problems)))
        self.problems = tuple(problems)


def unreachable(address: str, complaint: str, ssh: str) -> Problem:
    """What ssh's complaint means.

    Args:
        complaint: the last line of its standard error; empty: it said nothing in time.
        ssh: a command to try by hand.
    """
    text = complaint or "no answer within 10 s"
    is_absent = False
    if "Permission denied" in complaint:
        remedy = "give it a key that needs no password (ssh-copy-id), or name one: --ssh_identity"
    elif "Host key verification failed" in complaint:
        remedy = f"its key is not known here: log in once by hand ({ssh})"
    elif "Could not resolve" in complaint:
        remedy = "is the name right? An address works too"
    elif "python" in complaint and ("not found" in complaint or "No such file" in complaint):
        remedy = "name an interpreter there: --remote_python=/usr/bin/python3"
    elif "Traceback" in complaint or "Error" in complaint:
        remedy = "its Python must be 3.10 or newer: --remote_python"
    else:
        remedy = f"is it up, and is the name right? Try: {ssh}"
        is_absent = True
    return Problem(address, f"{text}; {remedy}", is_absent=is_absent)


def problems(
    surveys: Mapping[str, Mapping[str, Any]], command: str, directory: str
) -> list[Problem]:
    """What is wrong on single hosts, and between them.

    Args:
        surveys: what each host has answered (see `launch.survey`), by address.
        command: the workers' program.
        directory: where it is to run.
    """
    found = []
    reference: Mapping[str, str] = {}
    reference_address = ""
    for address, survey in surveys.items():
        listens = survey.get("listens", "")
        if "directory" in survey:
            found.append(
                Problem(
                    address,
                    f"the working directory {directory}: {survey['directory']};"
                    " make it there, or start from one that all hosts have",
                )
            )
        elif "command" in survey:
            remedy = "install it there, or put its folder into PATH here, which is carried over"
            if survey["command"] != "missing":
                remedy = "chmod +x it there"
            text = f"the command {command} is {survey['command']}; {remedy}"
            found.append(Problem(address, text, status=_MISSING_COMMAND))
        elif ": " in listens:
            found.append(Problem(address, f"cannot listen on its own name, {listens}"))
        elif len(surveys) > 1 and _is_loopback(listens):
            found.append(
                Problem(
                    address,
                    f"it takes its own name for {listens} (its /etc/hosts), where the others do not"
                    " reach it; list it by its address instead",
                )
            )
        versions = survey.get("versions") or {}
        if versions and not reference:
            reference, reference_address = versions, address
        elif versions and versions != reference:
            differences = "; ".join(
                f"{name} {versions.get(name, 'missing')} here, {reference.get(name, 'missing')} on"
                f" {reference_address}"
                for name in {**reference, **versions}
                if versions.get(name) != reference.get(name)
            )
            found.append(Problem(address, f"{differences}; install the same versions on all hosts"))
    return found


def closed_ports(failures: Mapping[str, Sequence[Sequence[str]]]) -> list[Problem]:
    """From address -> what it cannot reach and why."""
    return [
        Problem(
            address,
            f"cannot reach {target}: {why}; open the ports between the hosts (a firewall?)",
        )
        for address, failed in failures.items()
        for target, why in failed
    ]


def clock_warnings(clocks: Mapping[str, tuple[float, float, float]]) -> list[str]:
    """From address -> its time, and the launcher's before the question and after the answer."""
    warnings = []
    for address, (there, before, after) in clocks.items():
        difference_s = there - min(max(there, before), after)
        if abs(difference_s) > _CLOCK_S:
            direction = "ahead of" if difference_s > 0 else "behind"
            warnings.append(
                f"{address}: its clock is {abs(difference_s):.0f} s {direction} the launcher's;"
                " times in logs will not agree"
            )
    return warnings


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False
