"""Reads that fail for the moment: the checkpoint is neither skipped nor replaced."""

import errno
import os

import pytest
import tensorflow as tf
from saved_run import SavedRun

from dist_train import RunError


def _os_error(code):
    return OSError(code, os.strerror(code))


@pytest.mark.parametrize(
    "error",
    [
        tf.errors.UnavailableError(None, None, "Socket closed"),
        tf.errors.DeadlineExceededError(None, None, "Timed out"),
        tf.errors.PermissionDeniedError(None, None, "Permission denied"),
        tf.errors.UnauthenticatedError(None, None, "token expired"),
        tf.errors.ResourceExhaustedError(None, None, "Too many open files"),
        tf.errors.AbortedError(None, None, ""),
        tf.errors.CancelledError(None, None, "Cancelled"),
        # What TensorFlow's reader makes of an error of the system.
        tf.errors.OpError(None, None, "a/state.index; Too many open files", tf.errors.UNKNOWN),
        *map(_os_error, (errno.EACCES, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE)),
        *map(_os_error, (errno.ENOSPC, errno.ETIMEDOUT, errno.ECONNRESET)),
        MemoryError(),
    ],
    ids=repr,
)
@pytest.mark.parametrize("name", [None, "2"])
def test_one_that_cannot_be_read_for_now_is_not_damaged(folder, monkeypatch, caplog, name, error):
    run = SavedRun(folder)
    run.save(1, 2)

    def read(*args):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(tf.train.Checkpoint, "read", read)
        with pytest.raises(RunError, match=r"step-00000002 cannot be read: .+; run the same"):
            run.checkpoints.restore(name)
    assert "damaged" not in caplog.text
    run.save(3)
    assert run.checkpoints.steps() == [1, 2, 3]
    assert run.restore("2") == 2


def test_what_hides_from_the_reader_is_seen_by_a_plain_read(folder, monkeypatch):
    run = SavedRun(folder)
    run.save(1, 2)

    def read(*args):
        raise tf.errors.OpError(None, None, "HTTP response code 503", tf.errors.UNKNOWN)

    def unavailable(*args):
        raise tf.errors.UnavailableError(None, None, "HTTP response code 503")

    monkeypatch.setattr(tf.train.Checkpoint, "read", read)
    with monkeypatch.context() as patched:
        patched.setattr(tf.io.gfile.GFile, "read", unavailable)
        with pytest.raises(RunError, match=r"step-00000002 cannot be read: HTTP response code 503"):
            run.checkpoints.restore()
    with pytest.raises(RunError, match=r"all 2 checkpoints in .* are damaged"):
        run.checkpoints.restore()
