"""A training under the launcher: killed, stopped, hung, and the same numbers in the end."""

import os
import re
import signal
import sys
from pathlib import Path

import pytest
from trajectory import STEPS, TRAIN, assert_same_run, wait_for_step

from dist_train.rows import read_rows


def launch(*flags, workdir="run"):
    """Arguments of python for a launcher of two workers."""
    worker = [sys.executable, *TRAIN, "--strategy=multi_worker", f"--workdir={workdir}"]
    return ["-m", "launch", "--workers=2", *flags, "--", *worker]


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


@pytest.mark.slow
def test_a_training_whose_worker_is_killed_ends_on_the_uninterrupted_weights(
    group, tmp_path, whole_run
):
    launcher = group.start(launch("--max_restarts=1"))
    wait_for_step(tmp_path / "run", 300, launcher)
    os.kill(workers_of(launcher)[1], signal.SIGKILL)
    assert group.wait(120) == [0], group.output(0)
    assert "resumed after step" in group.output(0)
    assert re.search(r"worker 1.*SIGKILL", group.output(0))
    assert_same_run(tmp_path / "run", whole_run)
    assert workers_of(launcher) == {}


@pytest.mark.slow
def test_a_training_that_is_stopped_leaves_with_75_and_goes_on(group, tmp_path, whole_run):
    launcher = group.start(launch())
    wait_for_step(tmp_path / "run", 300, launcher)
    launcher.send_signal(signal.SIGTERM)
    assert group.wait(60) == [75], group.output(0)
    assert workers_of(launcher) == {}
    group.next_round()
    group.start(launch())
    assert group.wait(120) == [0], group.output(0)
    assert "resumed after step" in group.output(0)
    assert_same_run(tmp_path / "run", whole_run)


@pytest.mark.slow
def test_a_worker_that_hangs_is_named_and_its_stacks_are_shown(group, tmp_path):
    # TensorFlow itself may notice a frozen peer from 5 s on, and end the other worker.
    launcher = group.start(launch("--stall_timeout_s=3", "--grace_period_s=2"))
    wait_for_step(tmp_path / "run", 100, launcher)
    os.kill(workers_of(launcher)[1], signal.SIGSTOP)
    assert group.wait(60) == [1], group.output(0)
    assert re.search(r"worker 1.*stopped", group.output(0)), group.output(0)
    assert "most recent call first" in group.output(0)
    assert workers_of(launcher) == {}


@pytest.mark.slow
def test_an_evaluator_follows_the_checkpoints_of_the_workers(group, tmp_path):
    group.start(launch("--evaluator"))
    assert group.wait(120) == [0], group.output(0)
    rows = read_rows(tmp_path / "run" / "follow.jsonl")
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps))
    assert steps[-1] == STEPS
    assert rows[-1]["accuracy"] > 0.5
