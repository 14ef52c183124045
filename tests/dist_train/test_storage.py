"""Where checkpoints are kept: a disk, and what only tf.io.gfile gets to."""

import errno
import os
import shutil

import pytest
import tensorflow as tf
from saved_run import SavedRun

from dist_train import RunError


def test_a_full_disk_is_an_error_and_the_earlier_ones_stay(folder, monkeypatch):
    run = SavedRun(folder)
    run.save(1)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"step 2 could not be written .*No space left"):
        run.save(2)
    monkeypatch.undo()
    assert [path.name for path in folder.iterdir()] == ["step-00000001"]
    assert run.restore() == 1


def test_a_file_where_the_folder_should_be_is_an_error(folder):
    folder.write_text("")
    with pytest.raises(RunError, match="could not be written"):
        SavedRun(folder).save(1)


def test_files_are_on_the_disk_before_the_name_is(folder, monkeypatch):
    events = []
    fsync, rename = os.fsync, type(folder).rename

    def synced(descriptor):
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def renamed(path, target):
        if path.name.startswith("partial-"):  # none is there that would have to give way
            events.append(f"rename {path.name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(type(folder), "rename", renamed)
    SavedRun(folder).save(1)
    place = events.index("rename partial-step-00000001")
    assert set(events[:place]) == {
        "state.index",
        "state.data-00000-of-00001",
        "partial-step-00000001",
    }
    assert events[place + 1 :] == ["checkpoints"]


def test_the_best_takes_no_room_of_its_own(folder):
    run = SavedRun(folder)
    run.save(2, best=True)
    for name in ("state.index", "state.data-00000-of-00001"):
        assert (folder / "best-00000002" / name).samefile(folder / "step-00000002" / name)


def test_the_best_is_copied_where_there_are_no_links(folder, monkeypatch):
    def refuse(*args):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    run = SavedRun(folder)
    run.save(2, best=True)
    shutil.rmtree(run.path(2))
    assert run.restore("best") == 2


# Where only tf.io.gfile gets to.


@pytest.fixture(params=["file", "ram"])
def remote(request, tmp_path):
    return f"file://{tmp_path}/far" if request.param == "file" else f"ram://{tmp_path}/far"


def test_a_remote_storage_keeps_checkpoints_too(remote):
    run = SavedRun(remote, keep=2)
    assert run.restore() is None
    run.save(1)
    run.save(2, best=True)
    run.save(3, 4)
    again = SavedRun(remote)
    assert again.checkpoints.steps() == [3, 4]
    assert again.restore() == 4
    assert again.restore("best") == 2
    assert again.restore(f"{remote}/step-00000003") == 3


def test_a_remote_checkpoint_without_its_index_is_none(remote):
    run = SavedRun(remote)
    run.save(1, 2)
    tf.io.gfile.remove(f"{remote}/step-00000002/state.index")
    again = SavedRun(remote)
    assert again.checkpoints.steps() == [1]
    assert again.restore() == 1
    again.save(2)
    assert SavedRun(remote).restore() == 2


def test_the_index_of_a_remote_checkpoint_comes_last(remote, monkeypatch):
    copied = []
    copy = tf.io.gfile.copy

    def noted(source, target, overwrite=False):
        copied.append(target.rpartition("/")[2])
        copy(source, target, overwrite=overwrite)

    monkeypatch.setattr(tf.io.gfile, "copy", noted)
    SavedRun(remote).save(1, best=True)
    assert copied == ["state.data-00000-of-00001", "state.index"] * 2
