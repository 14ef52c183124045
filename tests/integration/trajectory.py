"""One training run in many ways: its command, its progress, and whether two runs were the same."""

import time
from pathlib import Path

import keras
import numpy as np

from dist_train import metrics

SMALL = f"{Path(__file__).parent / 'small.py'}:task"
STEPS = 1600
SETTINGS = ["--epochs=100", "--eval_epochs=0", "--log_steps=100", "--checkpoint_steps=50"]
TRAIN = ["-m", "dist_train", f"--task={SMALL}", *SETTINGS]


def losses(workdir):
    rows = metrics.read_rows(Path(workdir) / "metrics.jsonl")
    return [(r["step"], r["loss"], r["batch_loss"]) for r in rows if r["kind"] == "train"]


def wait_for_step(workdir, step, describe, timeout_s=90):
    """Returns when the run has logged that step; `describe()` is said if it does not."""
    deadline = time.monotonic() + timeout_s
    while not any(reached >= step for reached, *_ in losses(workdir)):
        assert time.monotonic() < deadline, describe()
        time.sleep(0.05)


def assert_same_run(workdir, other):
    np.testing.assert_allclose(losses(workdir), losses(other), rtol=2e-4, atol=2e-5)
    assert losses(workdir)[-1][0] == STEPS
    mine, theirs = (
        keras.saving.load_model(Path(d) / "model.keras").get_weights() for d in (workdir, other)
    )
    for a, b in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4)
