"""Checkpoints by their names: the best one, and others that are asked for."""

import errno
import os
import shutil

import pytest
from saved_run import SavedRun

from dist_train import RunError, UsageError, storage


def test_the_best_outlives_the_newest(folder):
    run = SavedRun(folder, keep=1)
    run.save(1)
    run.save(2, best=True)
    run.save(3, 4)
    assert sorted(path.name for path in folder.iterdir()) == ["best-00000002", "step-00000004"]
    assert run.restore("best") == 2
    run.save(5, best=True)
    assert sorted(path.name for path in folder.iterdir()) == ["best-00000005", "step-00000005"]
    assert run.restore("best") == 5
    assert run.restore() == 5


def test_a_best_one_that_could_not_be_copied_is_made_again(folder, monkeypatch):
    run = SavedRun(folder, keep=1)
    run.save(1, best=True)

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(storage.LocalStorage, "duplicate", full)
        with pytest.raises(RunError, match=r"step 2 could not be kept as the best one in .*No spa"):
            run.save(2, best=True)
    again = SavedRun(folder, keep=1)
    assert again.restore() == 2
    again.checkpoints.mend_best(2)
    again.save(3)
    assert sorted(path.name for path in folder.iterdir()) == ["best-00000002", "step-00000003"]
    assert again.restore("best") == 2


def test_a_best_one_that_is_there_is_not_made_again(folder):
    run = SavedRun(folder, keep=1)
    run.save(1, best=True)
    before = (folder / "best-00000001").stat().st_mtime_ns
    run.checkpoints.mend_best(1)
    assert (folder / "best-00000001").stat().st_mtime_ns == before
    run.save(2)
    run.checkpoints.mend_best(1)  # of whose step there is no other any more
    assert run.restore("best") == 1


def test_an_older_best_one_is_never_taken_for_the_best(folder):
    run = SavedRun(folder)
    run.save(1, best=True)
    run.save(2)
    with pytest.raises(RunError, match=r"best-00000002, whose weights .* is not in .*put it back"):
        run.checkpoints.restore_best(2)
    run.checkpoints.restore_best(1)
    assert float(run.model.get_weights()[0][0, 0]) == 1.0


def test_a_checkpoint_is_restored_by_its_step_or_its_folder(folder, tmp_path):
    run = SavedRun(folder)
    run.save(1, 2, 3)
    assert run.restore("2") == 2
    assert run.restore(str(folder / "step-00000001")) == 1
    assert run.restore(f"{folder}/step-00000001/") == 1
    shutil.copytree(run.path(3), tmp_path / "mine")
    _fill_and_restore = SavedRun(tmp_path / "other")
    _fill_and_restore.fill(-1)
    assert _fill_and_restore.checkpoints.restore(str(tmp_path / "mine")) == 0
    assert float(_fill_and_restore.model.get_weights()[0][0, 0]) == 3.0


@pytest.mark.parametrize("name", ["4", "best", "nowhere", "../step-00000001x", ""])
def test_a_checkpoint_that_is_not_there_is_an_error_that_lists_those_that_are(folder, name):
    run = SavedRun(folder)
    run.save(1, 2)
    with pytest.raises(UsageError, match=r"is neither one of those in .*\(1, 2\) nor the folder"):
        run.checkpoints.restore(name)


def test_a_damaged_one_that_was_asked_for_is_an_error(folder):
    run = SavedRun(folder)
    run.save(1, 2)
    os.truncate(run.path(2) / "state.index", 10)
    with pytest.raises(RunError, match=r"step-00000002/state is damaged"):
        run.checkpoints.restore("2")
