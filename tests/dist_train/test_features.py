"""Every training feature gives the same numbers on one, two and three replicas."""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf
from equivalence import EXAMPLES, STRATEGIES, X, Y, assert_same, run, runs_alike

import dist_train
from dist_train.rows import read_rows


def model():
    return keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(2)]
    )


def task(**changes):
    held_out = dist_train.Arrays(X[EXAMPLES:], Y[EXAMPLES:])
    fields = {
        "model": model,
        "train": dist_train.Arrays(X[:EXAMPLES], Y[:EXAMPLES]),
        "validation": held_out,
        "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        "metrics": {"accuracy": keras.metrics.sparse_categorical_accuracy},
    }
    return dist_train.Task(**{**fields, **changes})


FEATURES = {
    "momentum, scaled rate, cosine, accumulation": {
        "optimizer_args": "momentum=0.9,nesterov=true", "scale_lr": 10, "lr_schedule": "cosine",
        "warmup_steps": 3, "gradient_accumulation": 2,
    },
    "decay, linear, smoothing": {
        "optimizer": "adamw", "weight_decay": 0.1, "lr_schedule": "linear", "label_smoothing": 0.2,
        "learning_rate": 0.01,
    },
    "average, clipping, step": {
        "ema": 0.8, "clip_norm": 0.2, "learning_rate": 1.0, "lr_schedule": "step",
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("settings", FEATURES.values(), ids=FEATURES)
def test_a_feature_gives_the_same_numbers_on_every_strategy(tmp_path, settings):
    runs_alike(tmp_path, task(), **settings)


def test_evaluation_is_on_the_averaged_weights(tmp_path):
    found = run(tmp_path, task(), ema=0.8)
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    x, y = X[EXAMPLES:], Y[EXAMPLES:]
    averaged, last = (
        float(keras.losses.SparseCategoricalCrossentropy(from_logits=True)(y, model(x)))
        for model in (loaded, found.result.model)
    )
    assert found.validations[-1] == pytest.approx(averaged, rel=1e-5)
    assert found.validations[-1] != pytest.approx(last, rel=1e-3)


# Precision.


@pytest.mark.slow
def test_bfloat16_gives_the_same_numbers_on_every_strategy_within_its_precision(tmp_path):
    whole = runs_alike(tmp_path, task(), dtype="mixed_bfloat16", rtol=2e-2, atol=2e-3)
    assert {layer.compute_dtype for layer in whole.result.model.layers} == {"bfloat16"}


def overflow(y, outputs):
    """Only the gradient of a label of 2 is above 65,504, also at a lower loss scale."""
    each = keras.losses.sparse_categorical_crossentropy(tf.minimum(y, 1), outputs, from_logits=True)
    return tf.where(y == 2, 1e5 * each, 0.02 * each)


@pytest.mark.slow
def test_float16_leaves_out_the_same_steps_on_every_strategy(tmp_path):
    y = Y[:EXAMPLES].copy()
    y[33] = 2  # the third batch of each epoch: one replica's gradient overflows
    overflows = task(
        train=dist_train.Arrays(X[:EXAMPLES] / 10, y), loss=overflow, validation=None, metrics={}
    )
    settings = {"dtype": "mixed_float16", "shuffle": False, "learning_rate": 5.0}
    found = runs_alike(tmp_path, overflows, **settings, rtol=1e-2, atol=1e-3)
    whole = run(tmp_path / "float32", overflows, **{**settings, "dtype": "float32"})
    assert found.norms[:2] == pytest.approx(whole.norms[:2], rel=1e-2)  # of no scale
    assert found.norms[2] is None
    for name in STRATEGIES:
        path = tmp_path / name / "checkpoints" / "step-00000012" / "state"
        scale = tf.train.load_checkpoint(str(path)).get_tensor("scale/.ATTRIBUTES/VARIABLE_VALUE")
        assert scale == 2.0**13  # halved twice


# Early stopping.

STOPPING = {
    "epochs": 12, "optimizer": "adam", "learning_rate": 0.03, "log_steps": 5, "early_stopping": 3,
}  # fmt: skip


def noisy():
    """A third of the labels are wrong: from the sixth epoch on what is learned is the noise."""
    wrong = np.where(np.arange(EXAMPLES) % 3 == 0, 1 - Y[:EXAMPLES], Y[:EXAMPLES])
    held_out = dist_train.Arrays(X[EXAMPLES:], Y[EXAMPLES:])
    return task(train=dist_train.Arrays(X[:EXAMPLES], wrong), test=held_out)


@pytest.mark.slow
def test_early_stopping_ends_at_the_same_step_on_every_strategy(tmp_path):
    found = runs_alike(tmp_path, noisy(), **STOPPING)
    assert found.result.step == 9 * 6
    assert len(found.validations) == 9
    assert found.validations.index(min(found.validations)) == 5
    # The test and the exports are of the best, and the log has every step.
    assert found.result.metrics["test"]["loss"] == pytest.approx(min(found.validations), rel=1e-5)
    exported = keras.saving.load_model(tmp_path / "default" / "model.keras")
    for mine, theirs in zip(exported.get_weights(), found.weights, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    rows = read_rows(tmp_path / "default" / "metrics.jsonl")
    assert [r["step"] for r in rows if r["kind"] == "train"] == [*range(5, 54, 5), 54]


@pytest.mark.slow
def test_early_stopping_counts_on_after_a_stop_and_a_finished_run_stays_finished(
    tmp_path, stops_at
):
    whole = run(tmp_path / "whole", noisy(), **STOPPING)
    # After the second of three validations in a row without a gain.
    stopping = dataclasses.replace(noisy(), preprocess=stops_at(52))
    with pytest.raises(dist_train.Stopped, match="after step 52,"):
        run(tmp_path / "parts", stopping, **STOPPING, steps_per_loop=1)
    assert_same(whole, run(tmp_path / "parts", noisy(), **STOPPING))
    again = run(tmp_path / "parts", noisy(), **STOPPING).result
    assert again.step == whole.result.step
    assert again.metrics["test"] == pytest.approx(whole.result.metrics["test"], rel=1e-5)
    longer = run(tmp_path / "parts", noisy(), **(STOPPING | {"early_stopping": 4}))
    assert longer.result.step == 10 * 6


def test_a_gain_within_rounding_does_not_keep_a_run_going(tmp_path):
    settings = STOPPING | {"learning_rate": 1e-9, "early_stopping": 2}
    assert run(tmp_path, task(), **settings).result.step == 3 * 6


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"validation": None}, {"early_stopping": 2}, "needs validation examples"),
        (
            {"optimizer": keras.optimizers.SGD},
            {"optimizer_args": "momentum=0.5"},
            "the task makes its optimizer itself",
        ),
        ({"optimizer": keras.optimizers.SGD}, {"scale_lr": 8}, "scale_lr=8, and the task makes"),
        ({"optimizer": keras.optimizers.SGD}, {"clip_norm": 1.0}, "clip_norm=1.0, and the task"),
        (
            {"optimizer": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())},
            {},
            "scales the loss by itself",
        ),
        (
            {"optimizer": lambda: keras.optimizers.SGD(loss_scale_factor=8.0)},
            {},
            "scales the loss by itself",
        ),
        (
            {"loss": lambda y, outputs: outputs[:, 0]},
            {"label_smoothing": 0.1},
            "this task's is <lambda>",
        ),
        ({}, {"optimizer_args": "momentun=0.5"}, "sgd has no 'momentun'; it has .*momentum"),
        ({}, {"optimizer_args": "momentum=-1.0"}, "optimizer=sgd: .*momentum"),
    ],
)
def test_a_setting_without_an_effect_is_refused_before_training(
    tmp_path, changes, settings, message
):
    with pytest.raises(dist_train.UsageError, match=message):
        run(tmp_path, task(**changes), **settings)
