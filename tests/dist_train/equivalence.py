"""The same run on one, two and three replicas: what equivalence tests share."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import dist_train
from dist_train.loop import Result
from dist_train.rows import read_rows

EXAMPLES, BATCH = 80, 15  # 15 is padded for 2 replicas, and the last batch has 5
RNG = np.random.default_rng(0)
X = RNG.normal(size=(EXAMPLES + 23, 6)).astype(np.float32)
Y = (X.sum(axis=1) > 0).astype(np.int32)
STRATEGIES = {
    "default": {},
    "mirrored-2": {"strategy": "mirrored", "devices": 2},
    "mirrored-3": {"strategy": "mirrored", "devices": 3},
}


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run came to; losses and norms (of the gradient) are those of each step's batch."""

    losses: list[float]
    norms: list[float]
    validations: list[float]
    weights: list[np.ndarray]
    result: Result


def run(workdir, task, **settings) -> Run:
    values = {"batch_size": BATCH, "epochs": 2, "learning_rate": 0.1, "log_steps": 1}
    values["jit_compile"] = "false"  # seconds of compilation each; test_trajectory.py has both
    result = dist_train.train(task, dist_train.Config(workdir=str(workdir), **(values | settings)))
    rows = read_rows(Path(workdir) / "metrics.jsonl")
    return Run(
        losses=[row["batch_loss"] for row in rows if row["kind"] == "train"],
        norms=[row["gradient_norm"] for row in rows if row["kind"] == "train"],
        validations=[row["loss"] for row in rows if row["kind"] == "validation"],
        weights=result.model.get_weights(),
        result=result,
    )


def assert_same(one: Run, other: Run, rtol=2e-4, atol=2e-5) -> None:
    np.testing.assert_allclose(other.losses, one.losses, rtol=rtol, atol=atol)
    # JSON has no word for the norm of a gradient that is not finite.
    np.testing.assert_allclose(
        np.array(other.norms, float), np.array(one.norms, float), 5 * rtol, 5 * atol
    )
    np.testing.assert_allclose(other.validations, one.validations, rtol=rtol, atol=atol)
    for mine, theirs in zip(one.weights, other.weights, strict=True):
        np.testing.assert_allclose(theirs, mine, rtol=5 * rtol, atol=5 * atol)
    assert one.result.step == other.result.step
    for kind, values in one.result.metrics.items():
        assert other.result.metrics[kind] == pytest.approx(values, rel=rtol, abs=atol)


def runs_alike(folder, task, *, rtol=2e-4, atol=2e-5, **settings) -> Run:
    """Runs on every strategy, compares, and returns the run on one replica."""
    found = {
        name: run(folder / name, task, **settings, **strategy)
        for name, strategy in STRATEGIES.items()
    }
    for other in list(found)[1:]:
        assert_same(found["default"], found[other], rtol, atol)
    return found["default"]
