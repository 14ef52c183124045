"""One training run in many ways: its command, its progress, and whether two runs were the same."""

import time
from pathlib import Path

import keras
import numpy as np

from dist_train import rows

SMALL = str(Path(__file__).parent / "small.py")
# Paced: a fast machine would be through before a test has struck. Where none strikes: AT_ONCE.
SETTINGS = {
    "task": f"{SMALL}:paced",
    "epochs": 100,
    "eval_epochs": 0,
    "log_steps": 100,
    "checkpoint_steps": 50,
}
TRAIN = ["-m", "dist_train", *(f"--{name}={value}" for name, value in SETTINGS.items())]
AT_ONCE = f"--task={SMALL}:task"
STEPS = 1600
# Other numbers of replicas round other sums.
LOSS = {"rtol": 2e-4, "atol": 2e-5}
WEIGHTS = {"rtol": 1e-3, "atol": 2e-4}


def read_rows(workdir):
    return rows.read_rows(Path(workdir) / "metrics.jsonl")


def steps(workdir):
    """Those of its lines of training."""
    return [row["step"] for row in read_rows(workdir) if row["kind"] == "train"]


def weights(workdir):
    return keras.saving.load_model(Path(workdir) / "model.keras").get_weights()


def wait_for_step(workdir, step, *processes, timeout_s=120):
    """Returns when the run has logged that step; fails when one of its processes ends before."""
    deadline = time.monotonic() + timeout_s
    while not any(reached >= step for reached in steps(workdir)):
        for process in processes:
            assert process.poll() is None, process.log.read_text()
        late = time.monotonic() > deadline
        assert not late, "\n".join([f"no step {step}", *(p.log.read_text() for p in processes)])
        time.sleep(0.05)


def assert_same_run(workdir, other, *, names=("loss", "batch_loss"), loss=LOSS, weight=WEIGHTS):
    """That both logged the same lines, and these values of them, and ended on the same weights."""
    mine, theirs = read_rows(workdir), read_rows(other)
    assert [(r["kind"], r["step"]) for r in mine] == [(r["kind"], r["step"]) for r in theirs]
    assert len({(r["kind"], r["step"]) for r in mine}) == len(mine)
    for name in names:
        values = ([row[name] for row in rows if name in row] for rows in (mine, theirs))
        np.testing.assert_allclose(*values, **loss)
    for a, b in zip(weights(workdir), weights(other), strict=True):
        np.testing.assert_allclose(a, b, **weight)
