"""What the README says of migrating: the script before and the task after give the same numbers."""

import runpy
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from equivalence import STRATEGIES

import dist_train
from dist_train.rows import read_rows

EXAMPLES = Path(__file__).parents[1] / "examples"
# Another order of float32 additions over some 100 steps; a wrong factor would be far outside.
TOLERANCE = {"rtol": 1e-3, "atol": 1e-4}


def run(folder, task, **settings):
    """(result, rows of the validations) of a run in the order of the file."""
    config = dist_train.Config(
        **{"workdir": str(folder), "shuffle": False, "jit_compile": "false", **settings}
    )
    result = dist_train.train(task, config)
    return result, [
        row for row in read_rows(folder / "metrics.jsonl") if row["kind"] == "validation"
    ]


def assert_same_weights(model, other):
    for weights, expected in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_allclose(weights, expected, **TOLERANCE)


SETTINGS = {
    "migration_fit": {"batch_size": 32, "epochs": 4},
    "migration_loop": {
        "batch_size": 64, "epochs": 3, "optimizer": "adam", "learning_rate": 0.01, "clip_norm": 0.5
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_the_task_after_gives_the_numbers_of_the_script_before(tmp_path, name):
    script = runpy.run_path(str(EXAMPLES / f"{name}.py"))
    model, history = script["before"]()
    for strategy in ("default", "mirrored-2"):
        result, validations = run(
            tmp_path / strategy, script["task"], **SETTINGS[name], **STRATEGIES[strategy]
        )
        assert_same_weights(result.model, model)
        for key in history.keys() & {"val_loss", "val_accuracy"}:
            found = [row[key.removeprefix("val_")] for row in validations]
            np.testing.assert_allclose(found, history[key], **TOLERANCE)
    assert history["val_loss"][-1] < history["val_loss"][0]


RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 6)).astype(np.float32)
Y = (X.sum(axis=1) > 0).astype(np.int32)
WEIGHTS = RNG.uniform(0.2, 3.0, 64).astype(np.float32)


def model():
    return keras.Sequential([keras.Input((6,)), keras.layers.Dense(2)])


def loss(y, outputs):
    return keras.losses.sparse_categorical_crossentropy(y, outputs, from_logits=True)


def fit(optimizer=None, **arguments):
    keras.utils.set_random_seed(0)
    trained = model()
    trained.compile(
        optimizer=optimizer or keras.optimizers.SGD(0.5),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    trained.fit(X, Y, batch_size=16, epochs=2, shuffle=False, verbose=0, **arguments)
    return trained


def train(folder, y, loss, **settings):
    task = dist_train.Task(
        model=model, train=dist_train.Arrays(X, y), loss=loss,
        optimizer=lambda: keras.optimizers.SGD(0.5),
    )  # fmt: skip
    return run(folder, task, **{"batch_size": 16, "epochs": 2, **settings})[0].model


def test_weights_of_examples_belong_into_the_targets(tmp_path):
    weighted = train(
        tmp_path, (Y, WEIGHTS), lambda y, outputs: y[1] * loss(y[0], outputs),
        **STRATEGIES["mirrored-2"],
    )  # fmt: skip
    assert_same_weights(weighted, fit(sample_weight=WEIGHTS))


def test_weights_of_classes_belong_into_the_loss(tmp_path):
    weighted = train(tmp_path, Y, lambda y, outputs: tf.gather([1.0, 4.0], y) * loss(y, outputs))
    assert_same_weights(weighted, fit(class_weight={0: 1.0, 1: 4.0}))


def test_accumulated_batches_of_keras_are_parts_of_a_larger_batch(tmp_path):
    parts = train(tmp_path, Y, loss, batch_size=32, gradient_accumulation=2)
    assert_same_weights(parts, fit(keras.optimizers.SGD(0.5, gradient_accumulation_steps=2)))
