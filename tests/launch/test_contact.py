"""Questions to many machines, of which some do not answer."""

import os

import pytest

from launch.contact import Contacts
from launch.job import Login

ANSWERS = Login(("sh", "-c", 'while read -r line; do echo "{\\"got\\": $line}"; done'))
HANGS = Login(("sh", "-c", "exec sed d"))


@pytest.fixture
def requests():
    """A file as `StopRequests` is one, on which nothing comes."""
    source, end = os.pipe()
    with os.fdopen(source), os.fdopen(end):
        yield source


def test_machine_that_hangs_takes_no_time_of_later_questions(requests):
    logins = {"a": ANSWERS, "slow": HANGS, "b": ANSWERS}
    with Contacts(requests, 1.0) as contacts:
        answers = contacts.ask(dict.fromkeys(logins, b"1\n"), logins)
        assert answers == {"a": {"got": 1}, "b": {"got": 1}}
        assert contacts.complaints == {"slow": ""}
        for number in (2, 3):
            answers = contacts.ask(dict.fromkeys(("a", "b"), b"%d\n" % number), {})
            assert answers == {"a": {"got": number}, "b": {"got": number}}
