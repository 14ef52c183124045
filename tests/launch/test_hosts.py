"""Lists of hosts, and how workers are given to them."""

import re
import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from launch import hosts
from launch.errors import UsageError
from launch.hosts import Entry

_NAMES = st.from_regex(r"[a-z0-9]([a-z0-9.-]{0,20}[a-z0-9])?", fullmatch=True)
_ADDRESSES = _NAMES | st.ip_addresses(v=6).map(lambda ip: f"[{ip}]")
_USERS = st.just("") | st.text(string.ascii_lowercase, min_size=1, max_size=8)
_ENTRIES = st.builds(Entry, _ADDRESSES, st.integers(1, 999999), _USERS)
_LISTS = st.lists(_ENTRIES, min_size=1, max_size=8, unique_by=lambda entry: entry.address)


def login(entry):
    return f"{entry.user}@{entry.address}" if entry.user else entry.address


@given(_LISTS)
def test_list_is_read_as_it_was_written(entries):
    text = ",".join(f"{login(entry)}:{entry.slots}" for entry in entries)
    assert hosts.parse(text) == entries


@given(_LISTS, st.sampled_from([" slots={}", ":{}", "\tslots={}  # a comment"]))
def test_file_is_read_as_it_was_written_in_either_form(entries, form):
    lines = [f"{login(entry)}{form.format(entry.slots)}\n" for entry in entries]
    assert hosts.parse_file("# ours\n\n" + "\n".join(lines), "hosts") == entries


@given(st.text(max_size=40))
@example("n1:2:3")
@example("[::1")
@example("n1 slots=x")
@example("\u0661")
def test_any_text_is_a_list_of_usable_hosts_or_a_clear_error(text):
    for parse in (hosts.parse, lambda text: hosts.parse_file(text, "hosts")):
        try:
            entries = parse(text)
        except UsageError as error:
            assert str(error)  # noqa: PT017
        else:
            for entry in entries:
                assert entry.slots >= 1
                assert re.match(r"[A-Za-z0-9_\[]", entry.address)  # never an option of ssh's
                assert not re.search(r"\s", login(entry))
                assert not entry.user.startswith("-")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is no host; write name, name:slots"),
        ("n1,,n2", "'' is no host"),
        ("n1:0", "n1 has no slot"),
        ("n1:2:3", "'n1:2:3' is no host"),
        ("fd00::1", "'fd00::1' is no host; write name, name:slots or user@name:slots, and an IPv6"),
        ("-oProxyCommand=x", "'-oProxyCommand=x' is no host"),
        ("-x@n1", "'-x' is no user"),
        ("n1,n2,n1:2", "n1 is listed twice; list it once, with slots: n1:3"),
    ],
)
def test_bad_list_is_refused_with_what_to_write(text, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        hosts.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n1\nn2 slots=\n", "hosts, line 2: 'n2 slots='; write `name` or `name slots=2`"),
        ("n1 slots=2 max=3", "hosts, line 1"),
        ("n1:2 slots=2", "hosts, line 1: 'n1:2 slots=2' gives its slots twice"),
        ("n1 slots=0", "hosts, line 1: n1 has no slot"),
        ("# none\n\n", "hosts names no host"),
    ],
)
def test_bad_file_is_refused_with_its_line(text, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        hosts.parse_file(text, "hosts")


@given(_LISTS, st.integers(1, 20))
def test_workers_fill_the_hosts_in_their_order(entries, workers):
    if workers > sum(entry.slots for entry in entries):
        with pytest.raises(UsageError, match=f"--workers={workers} is more than"):
            hosts.fill(entries, workers)
        return
    filled = hosts.fill(entries, workers)
    assert sum(entry.slots for entry in filled) == workers
    full = filled[:-1]
    assert full == entries[: len(full)]
    assert filled[-1].address == entries[len(full)].address
    assert 1 <= filled[-1].slots <= entries[len(full)].slots


def test_too_few_slots_are_listed():
    with pytest.raises(
        UsageError,
        match=r"--workers=4 is more than the slots of the hosts \(n1 1, n2 2\); add hosts",
    ):
        hosts.fill(hosts.parse("n1,n2:2"), 4)
