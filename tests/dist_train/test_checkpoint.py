import errno
import os
import random
import re
import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf

from dist_train import RunError, UsageError
from dist_train.checkpoint import Checkpoints


class _Run:
    """A model whose weights all equal the step that was saved last."""

    def __init__(self, folder, keep=3, width=4, optimizer=keras.optimizers.Adam):
        self.folder = folder
        self.model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(width)])
        self.optimizer = optimizer()
        self.optimizer.build(self.model.trainable_variables)
        state = tf.train.Checkpoint(model=self.model, optimizer=self.optimizer)
        self.checkpoints = Checkpoints(folder, state, keep=keep)

    def save(self, *steps):
        for step in steps:
            self._fill(step)
            self.checkpoints.save(step)
            self._fill(-1)

    def restore(self):
        """The restored step, once all weights are found to be that step's."""
        self._fill(-1)
        step = self.checkpoints.restore()
        values = {float(v) for w in self.model.get_weights() for v in np.ravel(w)}
        assert values == {-1.0 if step is None else float(step)}
        return step

    def _fill(self, value):
        self.model.set_weights([np.full_like(w, value) for w in self.model.get_weights()])


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


def _truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def _flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 3] ^= 0x10
    path.write_bytes(raw)


def test_without_checkpoints_there_is_nothing_to_restore(folder):
    run = _Run(folder)
    assert run.restore() is None
    assert run.checkpoints.steps() == []
    assert not folder.exists()


def test_the_newest_is_restored(folder):
    _Run(folder).save(2, 10, 9)
    assert _Run(folder).restore() == 10


def test_only_the_newest_are_kept(folder):
    run = _Run(folder, keep=2)
    run.save(1, 2, 100_000_000, 3)
    assert run.checkpoints.steps() == [3, 100_000_000]
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000003", "step-100000000"]


def test_one_that_is_whole_is_not_written_again(folder):
    run = _Run(folder)
    run.save(5)
    before = {path: path.stat().st_mtime_ns for path in run.checkpoints.path(5).iterdir()}
    run.save(5)
    after = {path: path.stat().st_mtime_ns for path in run.checkpoints.path(5).iterdir()}
    assert after == before


@pytest.mark.parametrize("name", ["state.index", "state.data-00000-of-00001"])
@pytest.mark.parametrize("damage", [_truncate, _flip, os.unlink, lambda path: os.truncate(path, 0)])
def test_a_damaged_one_is_skipped_with_a_warning(folder, caplog, name, damage):
    run = _Run(folder)
    run.save(1, 2)
    damage(run.checkpoints.path(2) / name)
    assert _Run(folder).restore() == 1
    assert re.search(r"step-00000002 is damaged, skipped: .", caplog.text)


def test_a_changed_file_never_restores_other_weights(folder):
    _Run(folder).save(1, 2)
    run = _Run(folder)
    files = sorted(run.checkpoints.path(2).iterdir())
    raws = {path: path.read_bytes() for path in files}
    chance, skipped = random.Random(0), 0
    for _ in range(200):
        path = chance.choice(files)
        raw = bytearray(raws[path])
        raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
        path.write_bytes(raw[: chance.choice([len(raw), chance.randrange(len(raw))])])
        skipped += run.restore() == 1  # `restore` of _Run compares every weight with the step
        path.write_bytes(raws[path])
    assert skipped > 150


def test_a_damaged_one_is_replaced_when_the_run_gets_there_again(folder):
    first = _Run(folder)
    first.save(1, 2)
    _truncate(first.checkpoints.path(2) / "state.data-00000-of-00001")
    again = _Run(folder)
    assert again.restore() == 1
    again.save(2)
    assert _Run(folder).restore() == 2


def test_a_damaged_one_never_outlives_a_whole_one(folder):
    first = _Run(folder)
    first.save(1, 9)
    _truncate(first.checkpoints.path(9) / "state.index")
    again = _Run(folder, keep=1)
    assert again.restore() == 1
    again.save(2)
    assert _Run(folder).restore() == 2


def test_all_damaged_is_an_error(folder):
    run = _Run(folder)
    run.save(1, 2)
    for step in (1, 2):
        _truncate(run.checkpoints.path(step) / "state.index")
    with pytest.raises(RunError, match=r"all 2 checkpoints in .* are damaged; move the"):
        _Run(folder).checkpoints.restore()
    assert run.checkpoints.steps() == [1, 2]


def test_what_a_crash_left_half_written_is_no_checkpoint(folder):
    run = _Run(folder)
    run.save(1)
    (folder / "partial-00000002").mkdir()
    (folder / "partial-00000002" / "state.index").write_bytes(b"half")
    (folder / "step-2").mkdir()
    (folder / "notes.txt").write_text("mine")
    assert run.checkpoints.steps() == [1]
    assert run.restore() == 1
    run.save(2)
    assert run.restore() == 2
    assert sorted(path.name for path in folder.iterdir()) == [
        "notes.txt",
        "step-00000001",
        "step-00000002",
        "step-2",
    ]


@pytest.mark.parametrize(
    "other",
    [{"width": 5}, {"optimizer": keras.optimizers.SGD}, {"optimizer": keras.optimizers.Nadam}],
)
def test_another_model_or_optimizer_is_an_error(folder, other):
    _Run(folder).save(1, 2)
    with pytest.raises(UsageError, match=r"step-00000002 is of another model or optimizer"):
        _Run(folder, **other).checkpoints.restore()


def test_a_full_disk_is_an_error_and_the_earlier_ones_stay(folder, monkeypatch):
    run = _Run(folder)
    run.save(1)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"step 2 could not be written .*No space left"):
        run.save(2)
    monkeypatch.undo()
    assert [path.name for path in folder.iterdir()] == ["step-00000001"]
    assert run.restore() == 1


def test_a_failed_write_of_tensorflow_is_an_error(folder, monkeypatch):
    run = _Run(folder)
    run.save(1)

    def full(*args):
        raise tf.errors.ResourceExhaustedError(None, None, "disk full\nand more")

    monkeypatch.setattr(tf.train.Checkpoint, "write", full)
    with pytest.raises(RunError, match=r"\(disk full\); the earlier ones are intact"):
        run.save(2)
    assert run.checkpoints.steps() == [1]


def test_a_file_where_the_folder_should_be_is_an_error(folder):
    folder.write_text("")
    with pytest.raises(RunError, match="could not be written"):
        _Run(folder).save(1)


def test_files_are_on_the_disk_before_the_name_is(folder, monkeypatch):
    events = []
    fsync, rename = os.fsync, type(folder).rename

    def synced(descriptor):
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def renamed(path, target):
        events.append(f"rename {path.name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(type(folder), "rename", renamed)
    _Run(folder).save(1)
    place = events.index("rename partial-00000001")
    assert set(events[:place]) == {"state.index", "state.data-00000-of-00001", "partial-00000001"}
    assert events[place + 1 :] == ["checkpoints"]


def test_a_vanished_damaged_one_does_not_stop_a_save(folder):
    run = _Run(folder)
    run.save(1, 2)
    _truncate(run.checkpoints.path(2) / "state.index")
    assert run.restore() == 1
    shutil.rmtree(run.checkpoints.path(2))
    run.save(3)
    assert run.checkpoints.steps() == [1, 3]
