"""A task for worker processes: the first 1,000 pictures of MNIST, or a thousand others."""

import dataclasses
import os
import time

import keras
import tensorflow as tf

import dist_train
from dist_train.mnist import files, mlp


def task(begin=0):
    """1,000 examples to learn from and 203 to evaluate, from number `begin` on."""
    (x, y), _ = files.read(None)
    x, y = x[begin:], y[begin:]
    return dist_train.Task(
        model=mlp,
        train=dist_train.Arrays(x[:1000], y[:1000]),
        validation=dist_train.Arrays(x[1000:1203], y[1000:1203]),
        test=dist_train.Arrays(x[1203:1400], y[1203:1400]),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics={"accuracy": keras.metrics.sparse_categorical_accuracy},
        preprocess=lambda x, y, seed: (tf.cast(x, tf.float32) / 255.0, y),
    )


def dropout():
    """The same, with a model that draws random numbers."""
    plain = task()

    def model():
        return keras.Sequential(
            [
                keras.Input((28, 28)),
                keras.layers.Flatten(),
                keras.layers.Dense(64, activation="relu"),
                keras.layers.Dropout(0.3),
                keras.layers.Dense(10),
            ]
        )

    return dist_train.Task(
        model=model, train=plain.train, loss=plain.loss, preprocess=plain.preprocess
    )


class _Slow:
    """Examples that take a millisecond each, until Slurm has requeued the job."""

    def __init__(self, x, y):
        self._x, self._y = x, y

    def __len__(self):
        return len(self._x)

    def __getitem__(self, indices):
        if "SLURM_RESTART_COUNT" not in os.environ:
            time.sleep(0.001 * len(indices))
        return self._x[indices], self._y[indices]


def slow():
    """The same task and the same numbers, in a minute."""
    (x, y), _ = files.read(None)
    return dataclasses.replace(task(), train=_Slow(x[:1000], y[:1000]))


def own_data(config):
    """Data that depends on who asks: workers that disagree."""
    del config
    import json
    import os

    return task(begin=json.loads(os.environ["TF_CONFIG"])["task"]["index"] * 100)
