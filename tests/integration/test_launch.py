"""A training under the launcher: killed, stopped, hung, and the same numbers in the end."""

import os
import re
import signal
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest

from dist_train import metrics

HERE = Path(__file__).parent
SETTINGS = ["--epochs=250", "--eval_epochs=0", "--log_steps=100", "--checkpoint_steps=50"]
TRAIN = ["-m", "dist_train", f"--task={HERE / 'small.py'}:task", *SETTINGS]


def launch(*flags, workdir="run"):
    """Arguments of python for a launcher of two workers."""
    worker = [sys.executable, *TRAIN, "--strategy=multi_worker", f"--workdir={workdir}"]
    return ["-m", "launch", "--workers=2", *flags, "--", *worker]


def losses(workdir):
    rows = metrics.read_rows(Path(workdir) / "metrics.jsonl")
    return [(r["step"], r["loss"], r["batch_loss"]) for r in rows if r["kind"] == "train"]


def wait_for_step(launcher, workdir, step, timeout_s=60):
    deadline = time.monotonic() + timeout_s
    while not any(reached >= step for reached, *_ in losses(workdir)):
        assert launcher.poll() is None, launcher.log.read_text()
        assert time.monotonic() < deadline, launcher.log.read_text()
        time.sleep(0.05)


def workers_of(launcher):
    """Process ids of the trainers below a launcher, by the index in their TF_CONFIG, from /proc."""
    found: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            command = (entry / "cmdline").read_bytes()
            environ = (entry / "environ").read_bytes()
        except OSError:
            continue
        is_trainer = b"dist_train\0" in command and b"--strategy=multi_worker" in command
        match = re.search(rb"DIST_LAUNCH_INDEX=(\d+)", environ)
        if is_trainer and match and os.readlink(entry / "cwd") == str(launcher.log.parent):
            found[int(match[1])] = int(entry.name)
    return found


def assert_same_run(workdir, other):
    np.testing.assert_allclose(losses(workdir), losses(other), rtol=2e-4, atol=2e-5)
    mine, theirs = (
        keras.saving.load_model(d / "model.keras").get_weights() for d in (workdir, other)
    )
    for a, b in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4)


@pytest.fixture
def whole(group, tmp_path):
    """The same run by one process, without a fault."""
    group.start([*TRAIN, "--workdir=whole"])
    assert group.wait(120) == [0], group.output(0)
    group.next_round()
    return tmp_path / "whole"


@pytest.mark.slow
def test_a_training_whose_worker_is_killed_ends_on_the_uninterrupted_weights(
    group, tmp_path, whole
):
    launcher = group.start(launch("--max_restarts=1"))
    wait_for_step(launcher, tmp_path / "run", 300)
    os.kill(workers_of(launcher)[1], signal.SIGKILL)
    assert group.wait(120) == [0], group.output(0)
    assert "resumed after step" in group.output(0)
    assert re.search(r"worker 1.*SIGKILL", group.output(0))
    assert_same_run(tmp_path / "run", whole)
    assert workers_of(launcher) == {}


@pytest.mark.slow
def test_a_training_that_is_stopped_leaves_with_75_and_goes_on(group, tmp_path, whole):
    launcher = group.start(launch())
    wait_for_step(launcher, tmp_path / "run", 300)
    launcher.send_signal(signal.SIGTERM)
    assert group.wait(60) == [75], group.output(0)
    assert workers_of(launcher) == {}
    group.next_round()
    group.start(launch())
    assert group.wait(120) == [0], group.output(0)
    assert "resumed after step" in group.output(0)
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.slow
def test_a_worker_that_hangs_is_named_and_its_stacks_are_shown(group, tmp_path):
    launcher = group.start(launch("--stall_timeout_s=4", "--grace_period_s=2"))
    wait_for_step(launcher, tmp_path / "run", 100)
    os.kill(workers_of(launcher)[1], signal.SIGSTOP)
    assert group.wait(60) == [1], group.output(0)
    assert re.search(r"worker 1.*stopped", group.output(0)), group.output(0)
    assert "most recent call first" in group.output(0)
    assert workers_of(launcher) == {}


@pytest.mark.slow
def test_an_evaluator_follows_the_checkpoints_of_the_workers(group, tmp_path):
    group.start(launch("--evaluator"))
    assert group.wait(120) == [0], group.output(0)
    rows = metrics.read_rows(tmp_path / "run" / "follow.jsonl")
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps))
    assert steps[-1] == 4000
    assert rows[-1]["accuracy"] > 0.5
