import io
import json
import logging
import math
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_train.metrics import Console, MetricsFile, RunLog, Tally, means, read_rows

_FUZZ = settings(max_examples=150)


def _row(step, kind="train", **more):
    return {"kind": kind, "step": step, "loss": 0.5} | more


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


def test_means_divide_by_the_number_of_examples():
    sums = np.array([6.0, 4.0, 3.0])
    assert means(["loss", "weight", "accuracy"], sums) == {"loss": 1.5, "accuracy": 0.75}


def test_means_of_no_examples_are_nan():
    assert math.isnan(means(["loss", "weight"], np.zeros(2))["loss"])


def test_rows_are_read_as_they_were_written(path):
    file = MetricsFile(path, resumed_step=0)
    rows = [_row(1), _row(1, "validation", accuracy=0.1), _row(2, "test")]
    for number, row in enumerate(rows):
        file.write(row)
        assert read_rows(path) == rows[: number + 1]  # at once, without a close
    file.sync()
    file.close()


def test_no_file_has_no_rows(path):
    assert read_rows(path) == []


def test_a_resume_forgets_what_will_be_done_again(path):
    rows = [_row(1), _row(2), _row(2, "validation"), _row(2, "test"), _row(3), _row(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = MetricsFile(path, resumed_step=2)
    file.write(_row(3, loss=0.25))
    file.close()
    assert read_rows(path) == [_row(1), _row(2), _row(2, "validation"), _row(3, loss=0.25)]
    assert [p.name for p in path.parent.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("cut", range(1, 40))
def test_a_torn_last_line_is_passed_over(path, cut):
    whole = json.dumps(_row(1)) + "\n"
    torn = json.dumps(_row(2))
    path.write_text(whole + torn[:-cut])
    assert read_rows(path) == [_row(1)]
    file = MetricsFile(path, resumed_step=1)
    file.write(_row(2))
    file.close()
    assert read_rows(path) == [_row(1), _row(2)]
    assert path.read_text() == whole + torn + "\n"


_ODD = st.sampled_from(
    [
        b"",
        b"null",
        b"[1]",
        b"\xff\xfe",
        b"9" * 5000,
        b"[" * 100_000,
        b'{"kind": "train"}',
        b'{"step": 1}',
        b'{"kind": "train", "step": "1"}',
        b'{"kind": "train", "step": true}',
        b'{"kind": "train", "step": 1.5}',
        b'{"kind": "train", "step": null}',
    ]
) | st.binary(max_size=30).filter(lambda line: b"{" not in line)


@_FUZZ
@given(lines=st.lists(st.integers(0, 9) | _ODD, max_size=8), end=st.integers(0, 20))
def test_odd_lines_are_passed_over(path, lines, end):
    encoded = [json.dumps(_row(line)).encode() if isinstance(line, int) else line for line in lines]
    torn = json.dumps(_row(3)).encode()[:end]
    path.write_bytes(b"\n".join([*encoded, torn]))
    rows = [_row(line) for line in lines if isinstance(line, int)]
    assert read_rows(path) == rows
    MetricsFile(path, resumed_step=4).close()
    assert read_rows(path) == [row for row in rows if row["step"] <= 4]


class _Sink:
    def __init__(self):
        self.rows = []

    def write(self, row):
        self.rows.append(row)


def test_a_tally_gives_means_over_all_and_the_rate_of_what_was_timed():
    names = ("loss", "weight")
    fresh = Tally(names)
    assert fresh.examples_per_second() == 0.0
    fresh.add(np.array([6.0, 8.0]), 2.0)
    fresh.add(np.array([2.0, 4.0]), 1.0)
    assert fresh.means() == {"loss": 8 / 12}
    assert fresh.examples_per_second() == 4.0
    resumed = Tally(names, np.array([1.0, 4.0]))
    assert resumed.examples_per_second() == 0.0
    resumed.add(np.array([5.0, 8.0]), 2.0)
    assert resumed.means() == {"loss": 6 / 12}
    assert resumed.examples_per_second() == 4.0


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
