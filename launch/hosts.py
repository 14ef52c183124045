"""Lists of hosts: what --hosts and a host file say, and how many workers each host gets."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from launch.errors import UsageError

_ENTRY = re.compile(
    r"(?:(?P<user>[^\s@:,\[\]]+)@)?"
    r"(?P<address>[A-Za-z0-9_](?:[\w.-]*\w)?\.?|\[[0-9A-Fa-f:.]+(?:%[\w.-]+)?\])"
    r"(?::(?P<slots>\d{1,6}))?",
    re.ASCII,
)


@dataclass(frozen=True)
class Entry:
    """One host of a list.

    Attributes:
        address: its name or address; IPv6 in brackets.
        slots: how many workers it takes.
        user: whom to log in as; empty: it is not said.
    """

    address: str
    slots: int = 1
    user: str = ""


def parse(text: str) -> list[Entry]:
    """Reads `n1,user@n2:4,[fd00::3]:2`.

    Raises:
        UsageError: an entry cannot be read, or a host is there twice.
    """
    return _unique([_entry(part.strip(), f"--hosts={text}") for part in text.split(",")])


def parse_file(text: str, name: str) -> list[Entry]:
    """Reads a host file: a host a line, as above or with `slots=4` after it; `#` begins a comment.

    Args:
        text: its content.
        name: how errors call it.

    Raises:
        UsageError: a line cannot be read, a host is there twice, or there is none.
    """
    entries = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        where = f"{name}, line {number}"
        slots = [word for word in words[1:] if re.fullmatch(r"slots=\d{1,6}", word, re.ASCII)]
        if len(words) > 2 or len(slots) != len(words) - 1:
            raise UsageError(f"{where}: {line.strip()!r}; write `name` or `name slots=2`")
        entry = _entry(words[0], where)
        if slots:
            if ":" in words[0].rpartition("]")[2]:
                raise UsageError(f"{where}: {line.strip()!r} gives its slots twice")
            entry = _checked(replace(entry, slots=int(slots[0].partition("=")[2])), where)
        entries.append(entry)
    if not entries:
        raise UsageError(f"{name} names no host; write one a line, as `name slots=2`")
    return _unique(entries)


def _entry(text: str, where: str) -> Entry:
    match = _ENTRY.fullmatch(text)
    if match is None:
        raise UsageError(
            f"{where}: {text!r} is no host; write name, name:slots or user@name:slots,"
            " and an IPv6 address in brackets"
        )
    entry = Entry(match["address"], int(match["slots"] or 1), match["user"] or "")
    return _checked(entry, where)


def _checked(entry: Entry, where: str) -> Entry:
    if entry.slots < 1:
        raise UsageError(f"{where}: {entry.address} has no slot; leave it out, or give it one")
    if entry.user.startswith("-"):  # ssh would take it for an option
        raise UsageError(f"{where}: {entry.user!r} is no user")
    return entry


def _unique(entries: list[Entry]) -> list[Entry]:
    addresses = [entry.address for entry in entries]
    for address in addresses:
        if addresses.count(address) > 1:
            raise UsageError(
                f"{address} is listed twice; list it once, with slots: {address}:"
                f"{sum(entry.slots for entry in entries if entry.address == address)}"
            )
    return entries


def fill(entries: Sequence[Entry], workers: int) -> list[Entry]:
    """Gives the workers to the hosts in their order, each as many as it has slots.

    Returns:
        The hosts that get some, with as many slots as they get.

    Raises:
        UsageError: there are fewer slots than workers.
    """
    filled = []
    left = workers
    for entry in entries:
        if left:
            filled.append(replace(entry, slots=min(left, entry.slots)))
            left -= filled[-1].slots
    if left:
        slots = ", ".join(f"{entry.address} {entry.slots}" for entry in entries)
        raise UsageError(
            f"--workers={workers} is more than the slots of the hosts ({slots});"
            " add hosts, or slots as in name:2"
        )
    return filled
