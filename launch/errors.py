"""What the user has to change, and the exit status that says so."""


class UsageError(Exception):
    """The user has to change something; its text is one or two lines."""

    status = 2


class CommandNotFound(UsageError):
    """A program is not there."""

    status = 127


class CommandNotExecutable(UsageError):
    """A program is there, and cannot be run."""

    status = 126
