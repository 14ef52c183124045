"""The examples learn what they are to learn, on every strategy, and within their memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from equivalence import STRATEGIES, run

import dist_train
from dist_train.task import load

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = ("migration_fit", "migration_loop", "pictures", "regression", "text")


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_short(name):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 60


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "epochs", "metric", "least", "most"),
    [("regression", 9, "error", 0.0, 0.12), ("text", 3, "accuracy", 0.98, 1.0)],
)
def test_an_example_learns_the_same_on_two_replicas(tmp_path, name, epochs, metric, least, most):
    task = load(f"{EXAMPLES / name}.py:task", dist_train.Config())
    settings = {
        "optimizer": "adam", "learning_rate": 0.01, "epochs": epochs, "batch_size": 64,
        "log_steps": 50,
    }  # fmt: skip
    one = run(tmp_path / "one", task, **settings)
    other = run(tmp_path / "two", task, **settings, **STRATEGIES["mirrored-2"])
    assert least <= one.result.metrics["test"][metric] <= most
    assert other.result.step == one.result.step
    assert other.losses == pytest.approx(one.losses, rel=2e-2, abs=1e-3)


PEAK = """
import json, sys, threading, time
sys.path.insert(0, sys.argv[1])
import numpy as np
import pictures
import tensorflow as tf
import dist_train

def resident():
    "Bytes that cannot be read again from a file: what a limit of memory is about."
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024

def watch():
    while True:
        peaks.append(resident())
        time.sleep(0.005)

config = dist_train.Config(
    data_dir=sys.argv[2] + "/data", workdir=sys.argv[2] + "/run", batch_size=128, epochs=1,
    learning_rate=1.0,
)
task = pictures.task(config)
tf.constant(0)
before, peaks = resident(), []
threading.Thread(target=watch, daemon=True).start()
result = dist_train.train(task, config)
while_training = max(peaks) - before
before = resident()
copy = np.array(task.train.x)
print(json.dumps({
    "accuracy": result.metrics["test"]["accuracy"], "training": while_training,
    "copy": resident() - before, "file": copy.nbytes,
}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_pictures_that_are_larger_than_the_limit_are_streamed_within_it(tmp_path):
    limit = 576 * 2**20
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(EXAMPLES), str(tmp_path)],
        env=environ, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["accuracy"] > 0.95
    assert found["training"] < limit < found["file"]
    assert found["copy"] > limit  # the measure would notice
    (tmp_path / "data" / "pictures.raw").unlink()
