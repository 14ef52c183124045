"""What can go wrong in a way that a user can mend, and the exit status of each.

Messages are one or two lines: the value, the constraint, the remedy.
"""

import re

_SHOWN = 400  # characters


class DistTrainError(Exception):
    """The root of what this package raises on purpose."""

    exit_status = 1


class UsageError(DistTrainError, ValueError):
    """The flags, the environment, the task or the data cannot be used as they are."""

    exit_status = 2


class RunError(DistTrainError, RuntimeError):
    """The run failed after it had begun: a peer died, the loss is NaN, the disk is full."""

    exit_status = 1


class WorkerLost(RunError):
    """Another worker of the run has gone, or does not answer."""


class Stopped(DistTrainError):
    """The run was asked to stop and has saved its state; starting it again goes on from there."""

    exit_status = 75  # EX_TEMPFAIL of sysexits.h: try again later


def one_line(error: BaseException) -> str:
    """What a library's exception says, on one line, cut short and without a terminal's colours."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    return " ".join(plain.split())[:_SHOWN]
