"""The built-in task: classify 28 × 28 pictures into 10 classes, as MNIST and its relatives do.

It is written against the interface that every user has: a function from a Config to a Task.
"""

import functools
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from dist_train import Arrays, Config, Task, UsageError
from dist_train.mnist import files
from dist_train.mnist.augmentation import moved

_CLASSES = 10


def task(config: Config) -> Task:
    """MNIST, or what lies in config.data_dir in its format."""
    if config.model not in _MODELS:
        raise UsageError(f"model={config.model!r} is not one of {', '.join(_MODELS)}")
    (x, y), (x_test, y_test) = files.read(config.data_dir)
    validation = config.validation_size
    if validation >= len(x):
        raise UsageError(
            f"validation_size={validation} leaves nothing of {len(x)} training examples;"
            f" use less than {len(x)}"
        )
    split = len(x) - validation

    def preprocess(x: tf.Tensor, y: tf.Tensor, seed: tf.Tensor | None) -> tuple[Any, Any]:
        """uint8 [batch, 28, 28] in 0..255 -> float32 in 0..1, moved in training if asked for."""
        x = tf.cast(x, tf.float32) / 255.0
        shift, zoom, flip = config.augment_shift, config.augment_zoom, config.augment_flip
        if seed is not None and (shift or zoom or flip):
            x = moved(x, seed, shift=shift, zoom=zoom, flip=flip)
        return x, y

    return Task(
        model=_MODELS[config.model],
        train=Arrays(x[:split], y[:split]),
        validation=Arrays(x[split:], y[split:]) if validation else None,
        test=Arrays(x_test, y_test),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics={"accuracy": keras.metrics.sparse_categorical_accuracy},
        preprocess=preprocess,
    )


def mlp(width: int = 64, name: str = "mlp") -> keras.Model:
    """784-width-width-10: [batch, 28, 28] -> [batch, 10] logits; their softmax: probabilities."""
    return keras.Sequential(
        [
            keras.Input((28, 28)),
            keras.layers.Flatten(),
            keras.layers.Dense(width, activation="relu"),
            keras.layers.Dense(width, activation="relu"),
            keras.layers.Dense(_CLASSES),
        ],
        name=name,
    )


def cnn() -> keras.Model:
    """Three 3 × 3 convolutions of 16, 32, 64 channels: [batch, 28, 28] -> [batch, 10] logits."""
    return keras.Sequential(
        [
            keras.Input((28, 28)),
            keras.layers.Reshape((28, 28, 1)),
            keras.layers.Conv2D(16, 3, activation="relu", padding="same"),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(32, 3, activation="relu", padding="same"),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(64, 3, activation="relu", padding="same"),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            keras.layers.Dense(_CLASSES),
        ],
        name="cnn",
    )


def cnn128() -> keras.Model:
    """Convolutions of 16, 64, 128 channels: [batch, 28, 28] -> [batch, 10] logits.

    Three times the weights of `cnn`, and on CPU as fast: the later convolutions do without padding.
    """
    return keras.Sequential(
        [
            keras.Input((28, 28)),
            keras.layers.Reshape((28, 28, 1)),
            keras.layers.Conv2D(16, 3, activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(64, 3, activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(128, 3, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(_CLASSES),
        ],
        name="cnn128",
    )


def cnn5() -> keras.Model:
    """Five convolutions and a hidden layer, with dropout: [batch, 28, 28] -> [batch, 10] logits."""
    return keras.Sequential(
        [
            keras.Input((28, 28)),
            keras.layers.Reshape((28, 28, 1)),
            keras.layers.Conv2D(16, 3, activation="relu"),
            keras.layers.Conv2D(32, 3, activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Dropout(0.2),
            keras.layers.Conv2D(64, 3, activation="relu"),
            keras.layers.Conv2D(64, 3, activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Dropout(0.2),
            keras.layers.Conv2D(128, 3, activation="relu", padding="same"),
            keras.layers.Flatten(),
            keras.layers.Dropout(0.4),
            keras.layers.Dense(128, activation="relu"),
            keras.layers.Dropout(0.4),
            keras.layers.Dense(_CLASSES),
        ],
        name="cnn5",
    )


_MODELS: dict[str, Callable[[], keras.Model]] = {
    "mlp": mlp,
    "mlp512": functools.partial(mlp, 512, "mlp512"),
    "cnn": cnn,
    "cnn128": cnn128,
    "cnn5": cnn5,
}
