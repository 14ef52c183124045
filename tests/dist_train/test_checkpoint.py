import errno
import os
import random
import re
import shutil
import threading
from concurrent import futures

import keras
import numpy as np
import pytest
import tensorflow as tf
from saved_run import SavedRun

from dist_train import RunError, UsageError, storage
from dist_train.checkpoint import Checkpoints


def _truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def _flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 3] ^= 0x10
    path.write_bytes(raw)


def test_without_checkpoints_there_is_nothing_to_restore(folder):
    run = SavedRun(folder)
    assert run.restore() is None
    assert run.checkpoints.steps() == []
    assert not folder.exists()


def test_the_newest_is_restored(folder):
    SavedRun(folder).save(2, 10, 9)
    assert SavedRun(folder).restore() == 10


def test_only_the_newest_are_kept(folder):
    run = SavedRun(folder, keep=2)
    run.save(1, 2, 100_000_000, 3)
    assert run.checkpoints.steps() == [3, 100_000_000]
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000003", "step-100000000"]


def test_one_that_is_whole_is_not_written_again(folder):
    run = SavedRun(folder)
    run.save(5)
    before = {path: path.stat().st_mtime_ns for path in run.path(5).iterdir()}
    run.save(5)
    after = {path: path.stat().st_mtime_ns for path in run.path(5).iterdir()}
    assert after == before


@pytest.mark.parametrize("name", ["state.index", "state.data-00000-of-00001"])
@pytest.mark.parametrize("damage", [_truncate, _flip, os.unlink, lambda path: os.truncate(path, 0)])
def test_a_damaged_one_is_skipped_with_a_warning(folder, caplog, name, damage):
    run = SavedRun(folder)
    run.save(1, 2)
    damage(run.path(2) / name)
    assert SavedRun(folder).restore() == 1
    assert re.search(r"step-00000002 is damaged, skipped: .", caplog.text)


def test_a_changed_file_never_restores_other_weights(folder):
    SavedRun(folder).save(1, 2)
    run = SavedRun(folder)
    files = sorted(run.path(2).iterdir())
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
    first = SavedRun(folder)
    first.save(1, 2)
    _truncate(first.path(2) / "state.data-00000-of-00001")
    again = SavedRun(folder)
    assert again.restore() == 1
    again.save(2)
    assert SavedRun(folder).restore() == 2


def test_a_damaged_one_never_outlives_a_whole_one(folder):
    first = SavedRun(folder)
    first.save(1, 9)
    _truncate(first.path(9) / "state.index")
    again = SavedRun(folder, keep=1)
    assert again.restore() == 1
    again.save(2)
    assert SavedRun(folder).restore() == 2


def test_one_that_another_process_removes_meanwhile_is_not_damaged(folder, monkeypatch, caplog):
    run, reader = SavedRun(folder, keep=1), SavedRun(folder)
    run.save(1)
    read = reader.checkpoints._read

    def late(prefix):
        if prefix.startswith(str(run.path(1))):
            run.save(2)  # removes the first
        return read(prefix)

    monkeypatch.setattr(reader.checkpoints, "_read", late)
    assert reader.restore() == 2
    assert "damaged" not in caplog.text


def test_one_that_is_removed_is_gone_at_once_however_long_that_takes(folder, monkeypatch):
    run = SavedRun(folder, keep=1)
    run.save(1)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", lambda path, **options: None)  # or it was killed there
        run.save(2)
        assert run.checkpoints.steps() == [2]
        assert SavedRun(folder).restore() == 2
    run.save(3)
    assert [path.name for path in folder.iterdir()] == ["step-00000003"]


def test_the_best_that_another_process_replaces_meanwhile_is_read_anew(folder, monkeypatch):
    run, reader = SavedRun(folder), SavedRun(folder)
    run.save(1, best=True)
    read = reader.checkpoints._read

    def late(prefix):
        if "best-00000001" in prefix:
            run.save(2, best=True)
        return read(prefix)

    monkeypatch.setattr(reader.checkpoints, "_read", late)
    assert reader.restore("best") == 2


def test_all_damaged_is_an_error(folder):
    run = SavedRun(folder)
    run.save(1, 2)
    for step in (1, 2):
        _truncate(run.path(step) / "state.index")
    with pytest.raises(RunError, match=r"all 2 checkpoints in .* are damaged; move the"):
        SavedRun(folder).checkpoints.restore()
    assert run.checkpoints.steps() == [1, 2]


def test_what_a_crash_left_half_written_is_no_checkpoint(folder):
    run = SavedRun(folder)
    run.save(1)
    (folder / "partial-step-00000002").mkdir()
    (folder / "partial-step-00000003").mkdir()
    (folder / "partial-step-00000003" / "state.index").write_bytes(b"half")
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
    SavedRun(folder).save(1, 2)
    with pytest.raises(UsageError, match=r"step-00000002 is of another model or optimizer"):
        SavedRun(folder, **other).checkpoints.restore()


def test_a_failed_write_of_tensorflow_is_an_error(folder, monkeypatch):
    run = SavedRun(folder)
    run.save(1)

    def full(*args):
        raise tf.errors.ResourceExhaustedError(None, None, "disk full\nand more")

    monkeypatch.setattr(tf.train.Checkpoint, "write", full)
    with pytest.raises(RunError, match=r"\(disk full\); the earlier ones are intact"):
        run.save(2)
    assert run.checkpoints.steps() == [1]


def test_a_vanished_damaged_one_does_not_stop_a_save(folder):
    run = SavedRun(folder)
    run.save(1, 2)
    _truncate(run.path(2) / "state.index")
    assert run.restore() == 1
    shutil.rmtree(run.path(2))
    run.save(3)
    assert run.checkpoints.steps() == [1, 3]


# While the training goes on.


class _Gate:
    """Holds a save up until it is opened; knows whether one has come to it."""

    def __init__(self):
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self):
        self.reached.set()
        assert self.opened.wait(20)


def test_the_state_may_change_while_it_is_written(folder):
    gate = _Gate()
    run = SavedRun(folder, before=gate)
    run.fill(1)
    run.checkpoints.save(1)
    assert gate.reached.wait(20)
    run.fill(7)
    assert run.checkpoints.steps() == []
    gate.opened.set()
    run.checkpoints.wait()
    assert run.restore() == 1


def test_a_second_save_waits_for_the_first(folder):
    turns = threading.Semaphore(0)
    run = SavedRun(folder, before=lambda: turns.acquire(timeout=20))
    run.save_in_background(1)
    threading.Timer(0.3, turns.release).start()
    run.save_in_background(2)
    assert run.checkpoints.steps() == [1]
    turns.release()
    run.checkpoints.wait()
    assert run.restore() == 2


def test_what_failed_in_the_background_is_raised_once_by_the_next_call(folder):
    def fail():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run = SavedRun(folder, before=fail)
    run.save_in_background(3)
    futures.wait([run.checkpoints._written], 20)
    with pytest.raises(RunError, match=r"step 3 could not be written to .*No space left"):
        run.checkpoints.check()
    run.checkpoints.check()
    assert run.checkpoints.steps() == []


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_no_checkpoint(folder, bad):
    run = SavedRun(folder)
    run.save(1)
    with pytest.raises(RunError, match=r"kernel is not finite after step 2; what was saved"):
        run.save(2, value=bad)
    assert run.checkpoints.steps() == [1]


@pytest.mark.parametrize("replicas", [1, 2])
def test_the_copy_restores_all_that_a_plain_checkpoint_does(folder, replicas):
    devices = [f"CPU:{index}" for index in range(replicas)]
    tf.distribute.MirroredStrategy._collective_key_base += 50_000
    strategy = tf.distribute.MirroredStrategy(devices)
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input((3,)),
                keras.layers.Dense(4),
                keras.layers.BatchNormalization(synchronized=replicas > 1),
                keras.layers.Dropout(0.5),
            ]
        )
        optimizer = keras.optimizers.Adam()
        optimizer.build(model.trainable_variables)
        other = tf.Variable([1.0, 2.0])
    growing = tf.Variable([1.0], shape=[None])

    def state():
        return tf.train.Checkpoint(model=model, optimizer=optimizer, other=other, growing=growing)

    def change():
        for variable in (*model.variables, *optimizer.variables, other):
            variable.assign_add(tf.ones(variable.shape, variable.dtype))  # in place, if it may

    for number, weight in enumerate(model.trainable_variables):
        weight.assign(np.full(weight.shape, number + 0.5))
    checkpoints = Checkpoints(storage.opened(str(folder)), state, keep=3)
    checkpoints.save(3)  # makes the copies, which the next one fills anew
    change()
    growing.assign([3.0, 4.0])
    checkpoints.save(4)
    plain = state().write(str(folder / "plain"))
    change()
    checkpoints.wait()
    mine, theirs = (
        {
            name: tf.train.load_variable(path, name)
            for name, _ in tf.train.list_variables(path)
            if "OBJECT_GRAPH" not in name
        }
        for path in (str(folder / "step-00000004" / "state"), plain)
    )
    assert mine.keys() == theirs.keys()
    assert len(mine) > 15
    for name in mine:
        np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)


def test_a_whole_one_is_written_anew_where_that_is_asked_for(folder):
    run = SavedRun(folder)
    run.save(1)
    run.fill(7)
    run.checkpoints.save(1, anew=True)
    run.checkpoints.wait()
    run.fill(-1)
    assert run.checkpoints.restore() == 1
    assert float(run.model.get_weights()[0][0, 0]) == 7.0


def test_the_newest_pinned_one_is_kept(folder):
    run = SavedRun(folder, keep=2, pins=lambda step: step % 10 == 0)
    run.save(10, 20, 21, 22, 23)
    assert run.checkpoints.steps() == [20, 22, 23]
    run.save(30, 31, 32)
    assert run.checkpoints.steps() == [30, 31, 32]
