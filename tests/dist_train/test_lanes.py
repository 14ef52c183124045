"""Two halves of a batch side by side: the same numbers, and only where that is sure and pays."""

import keras
import numpy as np
import pytest
import small_run
import tensorflow as tf

import dist_train
from dist_train import lanes


@pytest.fixture
def chosen(monkeypatch):
    """What is chosen; two cores, and no run is too short."""
    found = []
    choose = lanes.choose

    def kept(*args, **settings):
        found.append(choose(*args, **settings))
        return found[-1]

    monkeypatch.setattr(lanes, "choose", kept)
    monkeypatch.setattr(lanes, "_cores", lambda: 2)
    monkeypatch.setattr(lanes, "_STEPS", 0)
    return found


def halves_mixed(x, y, seed):
    return (x if seed is None else (x + x[::-1]) / 2), y


@keras.saving.register_keras_serializable("lanes")
class Centered(keras.layers.Layer):
    def call(self, x, training=None):
        return x - tf.reduce_mean(x, axis=0) if training else x


@keras.saving.register_keras_serializable("lanes")
class Noisy(keras.layers.Layer):
    def call(self, x, training=None):
        return x + tf.random.normal(tf.shape(x)) if training else x


class Counting(keras.layers.Layer):
    def __init__(self):
        super().__init__()
        self.count = tf.Variable(0)

    def call(self, x, training=None):
        if training:
            self.count.assign_add(1)
        return x


class Drawing(keras.layers.Layer):
    """From the generator that all layers of a process share."""

    def call(self, x, training=None):
        return x + 1e-6 * keras.random.normal(x.shape[1:]) if training else x


class Own(keras.Model):
    """Weights that belong to no layer."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(6, 2))

    def call(self, x):
        return x @ self.kernel


def now_and_then_mixed(x, y, seed):
    if seed is None:
        return x, y
    mixes = tf.random.stateless_uniform([], seed[0]) < 0.3
    return tf.where(mixes, (x + x[::-1]) / 2, x), y


def model(*between, **dense):
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, activation="tanh", **dense),
            *between,
            keras.layers.Dense(2),
        ]
    )


def regularized():
    return model(kernel_regularizer=keras.regularizers.L2(0.1))


def moved(x, y, seed):
    if seed is None:
        return x, y
    return x + 0.1 * tf.sin(tf.cast(seed[:, :1] % 97 + seed[:, 1:], tf.float32)), y


@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        ({}, {}),
        ({}, {"input": "stream"}),
        ({}, {"optimizer": "adam", "clip_norm": 0.5, "learning_rate": 0.01}),
        ({}, {"on_nan": "skip", "label_smoothing": 0.1, "ema": 0.9}),
        ({"model": regularized}, {}),
        ({"preprocess": moved}, {"jit_compile": "true"}),
    ],
    ids=["plain", "stream", "clipped", "skip", "regularized", "preprocess"],
)
def test_halves_side_by_side_give_the_same_numbers(
    tmp_path, monkeypatch, chosen, changes, settings
):
    """Of 80 examples the second batch is one quarter full: its second half is all padding."""
    settings = {"batch_size": 64, "epochs": 3, "log_steps": 1, **settings}
    halves = small_run.train(tmp_path / "halves", changes, **settings)
    monkeypatch.setattr(lanes, "_cores", lambda: 1)
    whole = small_run.train(tmp_path / "whole", changes, **settings)
    assert chosen == [2, 1]
    close = {"rtol": 1e-4, "atol": 1e-6}
    for a, b in zip(halves.model.get_weights(), whole.model.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, **close)
    for kind, names in {
        "train": ("loss", "batch_loss", "accuracy", "gradient_norm", "examples"),
        "test": ("loss", "accuracy"),
    }.items():
        rows = [small_run.rows(tmp_path / name, kind) for name in ("halves", "whole")]
        assert len(rows[0]) == len(rows[1]) > 0
        for name in names:
            ours, theirs = ([row[name] for row in some] for some in rows)
            np.testing.assert_allclose(ours, theirs, err_msg=name, **close)


@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        ({"model": lambda: model(keras.layers.Dropout(0.5))}, {}),
        ({"model": lambda: model(keras.layers.BatchNormalization())}, {"batch_size": 80}),
        ({"model": lambda: model(keras.layers.LayerNormalization())}, {}),
        ({"model": lambda: model(Centered())}, {}),
        ({"model": lambda: model(Noisy())}, {}),
        ({"model": lambda: model(Counting())}, {}),
        ({"model": lambda: model(Drawing())}, {}),
        ({"model": Own}, {}),
        ({"model": lambda: model(keras.layers.Dense(600), keras.layers.Dense(600))}, {}),
        ({"preprocess": halves_mixed}, {}),
        ({"preprocess": now_and_then_mixed}, {}),
        ({"train": dist_train.Arrays(small_run.X[:1], small_run.Y[:1])}, {}),
        ({}, {"batch_size": 32}),
        ({}, {"batch_size": 65}),
        ({}, {"gradient_accumulation": 2}),
        ({}, {"dtype": "mixed_float16"}),
    ],
    ids=[
        "dropout", "batch-norm", "layer-norm", "other-examples", "random", "counting", "drawing",
        "own-weights", "large", "mixed", "mixed-at-random", "one-example", "small-batch",
        "odd-batch", "accumulated", "float16",
    ],
)  # fmt: skip
def test_a_step_that_may_not_or_should_not_be_halved_is_whole(tmp_path, chosen, changes, settings):
    small_run.train(tmp_path, changes, **{"batch_size": 64, "epochs": 1, **settings})
    assert chosen == [1]


@pytest.mark.parametrize(
    "settings", [{"strategy": "mirrored", "devices": 2}, {"jit_compile": "false"}]
)
def test_only_xla_on_one_replica_is_asked(tmp_path, chosen, settings):
    small_run.train(tmp_path, batch_size=64, epochs=1, **settings)
    assert chosen == []


def test_what_is_tried_leaves_no_trace(tmp_path, chosen):
    """Nothing runs before it is known to change nothing."""
    layer = Counting()
    small_run.train(tmp_path, {"model": lambda: model(layer)}, batch_size=80, epochs=3)
    assert chosen == [1]
    assert int(layer.count) == 3


def test_a_short_run_is_not_halved(tmp_path, chosen, monkeypatch):
    """It would not earn back what the second half takes to compile."""
    monkeypatch.setattr(lanes, "_STEPS", 3)
    small_run.train(tmp_path, batch_size=64, epochs=1)
    assert chosen == [1]


@pytest.mark.parametrize("threads", ["1", "0", ""])
def test_cores_are_the_threads_of_tensorflow(monkeypatch, threads):
    monkeypatch.setenv("TF_NUM_INTRAOP_THREADS", threads)
    monkeypatch.setattr(lanes.os, "sched_getaffinity", lambda _: {0, 1, 2})
    assert lanes._cores() == (1 if threads == "1" else 3)


def test_it_is_said(tmp_path, chosen, caplog):
    with caplog.at_level("INFO", logger="absl"):
        small_run.train(tmp_path, batch_size=64, epochs=1)
    assert chosen == [2]
    assert "two halves of a batch side by side" in caplog.text
