"""Runs side by side, from their workdirs alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dist_train import UsageError, comparison

ROOT = Path(__file__).parents[2]


def row(kind, step, **values):
    return {"kind": kind, "step": step, "epoch": 1, "examples": 64 * step, "time": 0.0, **values}


def write(folder, rows, **settings):
    folder.mkdir()
    config = {"workdir": str(folder), "seed": 0, "learning_rate": 0.1, **settings}
    (folder / "config.json").write_text(json.dumps({"config": config, "versions": {}}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))


@pytest.fixture
def runs(tmp_path):
    write(
        tmp_path / "a",
        [
            row("train", 200, loss=2.0, batch_loss=1.9, accuracy=0.1, examples_per_second=1000.0),
            row("train", 1400, loss=1.0, batch_loss=0.9, accuracy=0.5, examples_per_second=3000.0),
            row("validation", 1400, loss=1.25, accuracy=0.25),
            row("test", 1400, loss=1.5, accuracy=0.125),
        ],
        optimizer="adam",
    )
    write(
        tmp_path / "long name",
        [row("train", 200, loss=None, batch_loss=None, perplexity=7.0)],
        learning_rate=0.5,
    )
    return tmp_path


def compare(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "dist_train", "--compare", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONPROFILEIMPORTTIME": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_table_and_a_picture_are_made_without_tensorflow(runs):
    done = compare("a", "long name", cwd=runs)
    assert done.returncode == 0, done.stderr
    imported = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    assert imported
    assert not any("tensorflow" in line or "keras" in line for line in imported)
    lines = done.stdout.splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["run", "step", "train", "loss", "train", "accuracy", "train", "perplexity", "validation",
         "loss", "validation", "accuracy", "test", "loss", "test", "accuracy", "examples/s"],
        ["a", "1,400", "1.0000", "0.5000", "–", "1.2500", "0.2500", "1.5000", "0.1250", "2,000"],
        ["long", "name", "200", "–", "–", "7.0000", "–", "–", "–", "–", "–"],
    ]  # fmt: skip
    assert [line.split() for line in lines[4:7]] == [
        ["setting", "a", "long", "name"],
        ["learning_rate", "0.1", "0.5"],
        ["optimizer", "adam", "–"],
    ]  # fmt: skip
    assert lines[-1] == "the curves of all: compare.png"
    assert (runs / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_goes_where_output_says(runs):
    done = compare("a", "a", "--output=other.png", cwd=runs)
    assert done.returncode == 0, done.stderr
    assert "all settings are the same" in done.stdout
    assert (runs / "other.png").is_file()
    assert not (runs / "compare.png").exists()
    assert compare("a", "a", "--output=none/other.png", cwd=runs).returncode == 1


def test_what_is_no_run_is_named(runs):
    (runs / "empty").mkdir()
    with pytest.raises(UsageError, match="empty is no workdir of a run"):
        comparison.Run.read(str(runs / "empty"))
    write(runs / "begun", [])
    with pytest.raises(UsageError, match=r"begun has no rows in metrics.jsonl yet"):
        comparison.Run.read(str(runs / "begun"))
    (runs / "a" / "config.json").write_text("{")
    with pytest.raises(UsageError, match=r"a/config.json is damaged"):
        comparison.Run.read(str(runs / "a"))
