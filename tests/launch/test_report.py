"""Which failure comes first, and what the report says of the others."""

import pytest

from launch import report
from launch.report import Ended


def ended(name, code, at_s, **more):
    slot = None if name == "evaluator" else int(name.split()[1])
    return Ended(name=name, slot=slot, pid=100, code=code, at_s=at_s, **more)


LOST = b"... UnavailableError: Collective ops is aborted by: Socket closed\n"


@pytest.mark.parametrize(
    ("first", "others"),
    [
        # In time.
        (ended("worker 1", 3, 1.0), [ended("worker 0", 4, 1.1)]),
        # An error of its own before the loss of a peer, even when the peers were faster ...
        (ended("worker 1", 1, 2.0), [ended("worker 0", 1, 1.0, tail=LOST)]),
        # ... and even when it ended after all had been asked to stop.
        (ended("worker 1", 1, 3.0, asked=True), [ended("worker 0", 1, 1.0, tail=LOST)]),
        # What SIGKILL ended says nothing, so nothing can excuse it.
        (ended("worker 1", -9, 1.0, tail=LOST), [ended("worker 0", 1, 2.0, tail=LOST)]),
        # TensorFlow's own abort on the loss of a peer is a consequence too.
        (ended("worker 1", 1, 2.0), [ended("worker 0", -6, 1.0, tail=LOST)]),
        # Those that the launcher killed come last.
        (
            ended("worker 1", 1, 2.0, asked=True),
            [ended("worker 0", -9, 1.0, asked=True, killed="late")],
        ),
        # A stall was found before anybody ended.
        (ended("worker 1", 75, 9.0, stall="silent"), [ended("worker 0", 1, 5.0)]),
        # An evaluator never explains a worker's failure.
        (ended("worker 1", 1, 9.0), [ended("evaluator", 1, 5.0)]),
        # Stopping on request is no failure.
        (ended("worker 1", 1, 9.0), [ended("worker 0", 75, 5.0), ended("worker 2", -15, 6.0)]),
    ],
)
def test_first_failure_is_the_one_that_explains_the_others(first, others):
    assert report.first_failure([*others, first]) is first
    assert report.first_failure([first, *others]) is first


@pytest.mark.parametrize(
    ("group", "status"),
    [
        ([ended("worker 0", 0, 1.0), ended("worker 1", 0, 2.0)], 0),
        ([ended("worker 0", 75, 1.0), ended("worker 1", 0, 2.0)], 75),
        ([ended("worker 0", 143, 1.0), ended("worker 1", -15, 2.0)], 75),
        ([ended("worker 0", -2, 1.0, asked=True)], 75),
        ([ended("worker 0", -2, 1.0)], 130),
        ([ended("worker 0", 75, 1.0), ended("worker 1", 3, 2.0)], 3),
        ([ended("worker 0", -9, 1.0)], 137),
        ([ended("worker 0", -40, 1.0)], 168),
        ([ended("worker 0", 75, 1.0, stall="silent")], 1),
        ([ended("worker 0", 0, 1.0), ended("evaluator", 4, 0.5)], 4),
        ([ended("worker 0", 0, 1.0), ended("evaluator", -9, 9.0, asked=True, killed="late")], 0),
        ([ended("worker 0", 0, 1.0), ended("evaluator", -15, 9.0, asked=True)], 0),
    ],
)
def test_exit_status_is_that_of_the_first_failure(group, status):
    assert report.exit_status(group) == status


def test_report_names_the_first_and_marks_the_consequences():
    text = report.describe(
        [
            ended("worker 0", 1, 3.1, tail=LOST),
            ended("worker 1", -9, 2.0, oom=True, tail=b"step 1\nstep 2"),
            ended("worker 2", 0, 1.0),
            ended("worker 3", 75, 3.5, asked=True),
        ]
    )
    assert text.splitlines() == [
        "first failure, 2.0 s after the start:"
        " worker 1 (pid 100): killed by SIGKILL: out of memory, says the kernel",
        "its last lines:",
        "  | step 1",
        "  | step 2",
        "besides: worker 2: exit status 0",
        "consequences: worker 0: lost a peer, exit status 1;"
        " worker 3: stopped on request, exit status 75",
    ]


@pytest.mark.parametrize(("number", "name"), [(11, "SIGSEGV"), (34, "SIGRTMIN"), (40, "signal 40")])
def test_every_signal_can_be_reported(number, name):
    text = report.describe([ended("worker 0", -number, 1.0)])
    assert text.endswith(f"worker 0 (pid 100): killed by {name}")


def test_last_lines_are_few_and_readable():
    tail = b"\n".join(b"line %d" % i for i in range(100)) + b"\n\n 1%\r100%\r\n\xff half"
    text = report.describe([ended("worker 0", 1, 1.0, tail=tail)])
    assert text.splitlines()[-3:] == ["  | line 99", "  | 100%", "  | \ufffd half"]
    assert text.count("  | ") == 12
