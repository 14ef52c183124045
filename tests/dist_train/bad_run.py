"""Runs whose loss is not finite where that is asked for, and what becomes of them by hand."""

from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import dist_train
from dist_train.rows import read_rows

RNG = np.random.default_rng(0)
X = RNG.normal(size=(80, 6)).astype(np.float32)
Y = (X.sum(axis=1) > 0).astype(np.int32)
STRATEGIES = {
    "default": {},
    "mirrored": {"strategy": "mirrored", "devices": 2},
    "plain": {"jit_compile": "false"},
}
each_strategy = pytest.mark.parametrize("settings", STRATEGIES.values(), ids=STRATEGIES)


def model():
    return keras.Sequential([keras.Input((6,)), keras.layers.Dense(2)])


def bad_loss(y, outputs):
    """Not a number for the batch that has a label of 2."""
    each = keras.losses.sparse_categorical_crossentropy(tf.minimum(y, 1), outputs, from_logits=True)
    return tf.where(y == 2, np.nan, each)


def inf_gradient(y, outputs):
    """A finite loss whose gradient is not, for a label of 2: that of a root at zero."""
    each = keras.losses.sparse_categorical_crossentropy(tf.minimum(y, 1), outputs, from_logits=True)
    here = tf.cast(y == 2, tf.float32)
    root = tf.sqrt(tf.reduce_sum(outputs**2, axis=-1) * (1.0 - here))
    return each + here * root


def task(bad=(), loss=bad_loss, build=model):
    y = Y.copy()
    y[list(bad)] = 2
    return dist_train.Task(
        model=build,
        train=dist_train.Arrays(X, y),
        validation=dist_train.Arrays(X[:40], Y[:40]),
        loss=loss,
        metrics={"accuracy": keras.metrics.sparse_categorical_accuracy},
    )


def train(workdir, what=None, **settings):
    values = {"batch_size": 16, "epochs": 3, "learning_rate": 0.5, "log_steps": 1, "shuffle": False}
    config = dist_train.Config(workdir=str(workdir), **(values | settings))
    return dist_train.train(what or task(), config)


def rows(workdir, kind="train"):
    found = read_rows(Path(workdir) / "metrics.jsonl")
    return {row["step"]: row["loss"] for row in found if row["kind"] == kind}


def by_hand(steps, weights=None):
    """Weights after plain SGD on the batches of these steps (from 1; 5 make an epoch)."""
    keras.utils.set_random_seed(0)
    built = model()
    if weights is not None:
        built.set_weights(weights)
    for step in steps:
        at = (step - 1) % 5 * 16
        with tf.GradientTape() as tape:
            each = keras.losses.sparse_categorical_crossentropy(
                Y[at : at + 16], built(X[at : at + 16]), from_logits=True
            )
            loss = tf.reduce_mean(each)
        for variable, gradient in zip(
            built.trainable_variables, tape.gradient(loss, built.trainable_weights), strict=True
        ):
            variable.assign(variable - 0.5 * gradient)
    return built.get_weights()


def assert_weights(result, expected):
    for mine, theirs in zip(result.model.get_weights(), expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)
