"""From model.fit to a Task: the script before, the task after, and the same numbers.

python tests/examples/migration_fit.py
dist-train --task=tests/examples/migration_fit.py:task --batch_size=32 --epochs=4 --noshuffle
"""

import keras
import numpy as np

import dist_train


def rings(count, seed):
    """([n, 2] points, [n] classes 0 to 2): three rings, one around the other."""
    rng = np.random.default_rng(seed)
    classes, angle = rng.integers(0, 3, count), rng.uniform(0, 2 * np.pi, count)
    radius = 1 + classes + rng.normal(scale=0.2, size=count)
    points = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return points.astype(np.float32), classes.astype(np.int32)


def build_model():
    hidden = [keras.layers.Dense(32, activation="relu") for _ in range(2)]
    return keras.Sequential([keras.Input((2,)), *hidden, keras.layers.Dense(3)])


def before():
    keras.utils.set_random_seed(0)
    model = build_model()
    model.compile(
        optimizer=keras.optimizers.Adam(0.01),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    history = model.fit(
        *rings(960, seed=1),
        validation_data=rings(320, seed=2),
        batch_size=32, epochs=4, shuffle=False, verbose=2,
    )  # fmt: skip
    return model, history.history


def task():
    return dist_train.Task(
        model=build_model,
        train=dist_train.Arrays(*rings(960, seed=1)),
        validation=dist_train.Arrays(*rings(320, seed=2)),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics={"accuracy": keras.metrics.sparse_categorical_accuracy},
        optimizer=lambda: keras.optimizers.Adam(0.01),
    )


if __name__ == "__main__":
    before()
