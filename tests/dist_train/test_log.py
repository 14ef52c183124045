import io
import logging
import sys

import pytest

from dist_train.log import Console, RunLog
from dist_train.rows import read_rows


def _train_row(step):
    return {
        "step": step,
        "epoch": 1,
        "examples": 64 * step,
        "batch_loss": 2.0,
        "loss": 1.25,
        "accuracy": 0.5,
        "examples_per_second": 1e6,
    }


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


class _Sink:
    def __init__(self):
        self.rows = []

    def write(self, row):
        self.rows.append(row)


def test_every_sink_gets_the_row_with_kind_and_time():
    file, board = _Sink(), _Sink()
    log = RunLog(file, board, clock=lambda: 12.5)
    log.train(_train_row(2))
    log.evaluation("test", {"step": 2, "epoch": 1, "examples": 128, "loss": 1.0})
    assert file.rows == board.rows
    assert file.rows[0] == {"kind": "train", **_train_row(2), "time": 12.5}
    assert file.rows[1]["kind"] == "test"


def test_a_log_without_sinks_is_silent(capfd):
    log = RunLog()
    log.train(_train_row(1))
    log.evaluation("test", {"step": 1, "epoch": 1, "examples": 64, "loss": 1.0})
    log.advance(1)
    log.sync()
    assert capfd.readouterr() == ("", "")


def test_a_line_tells_batch_loss_and_examples_seen(caplog):
    log = RunLog(console=Console(total_steps=10, step=0, bar=False))
    with caplog.at_level(logging.INFO, logger="absl"):
        log.train(_train_row(1000))
        log.evaluation("validation", {"step": 1000, "epoch": 1, "loss": 1.0, "accuracy": 0.75})
    assert [record.getMessage() for record in caplog.records] == [
        "epoch 1  step 1,000  batch loss 2.0000  loss 1.2500  accuracy 0.5000"
        "  seen 64,000 examples  1,000,000 examples/s",
        "epoch 1  step 1,000  validation: loss 1.0000  accuracy 0.7500",
    ]


@pytest.mark.parametrize(
    ("waiting", "end"),
    [(0.0, "examples/s"), (0.09, "examples/s"), (0.428, ", 43 % of the time waiting for input")],
)
def test_a_line_tells_when_the_input_is_what_takes_the_time(caplog, waiting, end):
    log = RunLog(console=Console(total_steps=10, step=0, bar=False))
    with caplog.at_level(logging.INFO, logger="absl"):
        log.train(_train_row(1000), waiting=waiting)
    assert caplog.records[0].getMessage().endswith(end)


class _Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("progress", "stream", "shown"),
    [
        ("auto", _Terminal, True),
        ("auto", io.StringIO, False),
        ("true", io.StringIO, True),
        ("false", _Terminal, False),
    ],
)
def test_a_bar_is_for_terminals(path, monkeypatch, progress, stream, shown):
    monkeypatch.setattr(sys, "stderr", stderr := stream())
    board = path.parent / "tensorboard"
    with RunLog.opened(path, board, step=4, total_steps=10, progress=progress) as log:
        log.advance(3)
        log.train(_train_row(7))
    assert ("step" in stderr.getvalue()) == shown
    assert ("4/10" in stderr.getvalue()) == shown


def test_tensorboard_gets_each_number_at_its_step(path):
    import tensorflow as tf

    board = path.parent / "tensorboard"
    with RunLog.opened(path, board, step=0, total_steps=10, progress="false") as log:
        log.train(_train_row(7))
        log.evaluation("validation", {"step": 7, "epoch": 1, "examples": 9, "loss": 0.25})
    (events,) = board.iterdir()
    found = {
        value.tag: (event.step, value.simple_value)
        for event in tf.compat.v1.train.summary_iterator(str(events))
        for value in event.summary.value
    }
    assert found == {
        "train/batch_loss": (7, 2.0),
        "train/loss": (7, 1.25),
        "train/accuracy": (7, 0.5),
        "train/examples_per_second": (7, 1e6),
        "validation/loss": (7, 0.25),
    }
    assert [row["kind"] for row in read_rows(path)] == ["train", "validation"]


def test_the_numbers_are_kept_where_tensorboard_has_no_place(path, caplog):
    board = path.parent / "tensorboard"
    board.write_text("a file where the folder should be")
    with RunLog.opened(path, board, step=0, total_steps=10, progress="false") as log:
        log.settings({"seed": 3})
        log.train(_train_row(7))
        log.evaluation("validation", {"step": 7, "epoch": 1, "examples": 9, "loss": 0.25})
    assert caplog.text.count("cannot be written at all") == 1
    assert [row["kind"] for row in read_rows(path)] == ["train", "validation"]
