"""A task of 100 examples and two layers, and runs of it."""

from pathlib import Path

import keras
import numpy as np

import dist_train
from dist_train.rows import read_rows

RNG = np.random.default_rng(0)
X = RNG.normal(size=(100, 6)).astype(np.float32)
Y = (X.sum(axis=1) > 0).astype(np.int32)


def model():
    return keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(2)]
    )


def task(**changes):
    held_out = dist_train.Arrays(X[80:], Y[80:])
    fields = {
        "model": model,
        "train": dist_train.Arrays(X[:80], Y[:80]),
        "validation": held_out,
        "test": held_out,
        "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        "metrics": {"accuracy": keras.metrics.sparse_categorical_accuracy},
    }
    return dist_train.Task(**{**fields, **changes})


def train(workdir, changes=None, **settings):
    values = {"batch_size": 16, "epochs": 2, "learning_rate": 0.1, "log_steps": 2, **settings}
    return dist_train.train(
        task(**(changes or {})), dist_train.Config(workdir=str(workdir), **values)
    )


def rows(workdir, kind):
    found = read_rows(Path(workdir) / "metrics.jsonl")
    return [row for row in found if row["kind"] == kind]
