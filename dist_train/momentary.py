"""Momentary: errors at reading that say nothing of a file, so that another attempt may succeed.

What speaks of its content is damage instead, after which an older file is taken.
"""

import errno
import os

import tensorflow as tf

_ERRORS = (
    tf.errors.UnavailableError,
    tf.errors.DeadlineExceededError,
    tf.errors.PermissionDeniedError,
    tf.errors.UnauthenticatedError,
    tf.errors.ResourceExhaustedError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    PermissionError,
    TimeoutError,
    ConnectionError,
    MemoryError,
)
_CODES = (
    errno.EACCES,
    errno.EPERM,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ESTALE,
    errno.ENOSPC,
    errno.ETIMEDOUT,
)


def is_momentary(error: Exception, prefix: str) -> bool:
    """Whether a checkpoint could not be read for a reason that is not in its files.

    Args:
      error: at reading it.
      prefix: of the paths of its files.
    """
    if isinstance(error, _ERRORS) or getattr(error, "errno", None) in _CODES:
        return True
    if type(error) is not tf.errors.OpError:
        return False
    # So TensorFlow's reader calls most of what it meets, the text of the cause at its end; what
    # opens the files plainly tells the kind.
    if first_line(error).endswith(tuple(map(os.strerror, _CODES))):
        return True
    try:
        for path in tf.io.gfile.glob(f"{prefix}.*"):
            with tf.io.gfile.GFile(path, "rb") as file:
                file.read(1)
    except (tf.errors.OpError, OSError) as plain:
        return isinstance(plain, _ERRORS)
    return False


def first_line(error: Exception) -> str:
    """What an exception says, without the lines that follow."""
    lines = str(getattr(error, "message", error)).splitlines()
    return lines[0] if lines else type(error).__name__
