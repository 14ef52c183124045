"""A task for worker processes: the first 1,000 pictures of MNIST, or a thousand others."""

import dataclasses
import json
import os
import signal
import threading
import time
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import dist_train
from dist_train import mnist, stopping
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


def patient():
    """The same, in a process that takes all signals of a minute for one request."""
    stopping._SAME_REQUEST_S = 60.0
    return task()


class _Clinging(dist_train.Task):
    """Its destruction does not end."""

    def __del__(self):
        time.sleep(3600)


def clinging():
    """The same, but what a run holds of it cannot be taken down."""
    return _Clinging(**vars(task()))


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
        model=model,
        train=_Paced(plain.train, 0.1),
        loss=plain.loss,
        preprocess=plain.preprocess,
    )


def moving(config):
    """The same, of pictures that move as the built-in task moves them."""
    return dataclasses.replace(task(), preprocess=mnist.task(config).preprocess)


def noisy():
    """The same with wrong labels, so that the validation gets worse again."""
    plain = task()
    labels = np.where(np.arange(1000) % 2 == 0, (plain.train.y + 1) % 10, plain.train.y)
    return dataclasses.replace(plain, train=dist_train.Arrays(plain.train.x, labels))


def checked():
    """The same, with an assertion that fails on worker 1 alone, which has the second half."""
    plain = task()
    index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]

    def preprocess(x, y, seed):
        limit = 10 - 5 * index
        y = tf.cast(y, tf.int32)
        with tf.control_dependencies([tf.debugging.assert_less(y, limit, "a label of mine")]):
            return tf.cast(x, tf.float32) / 255.0, tf.identity(y)

    return dataclasses.replace(plain, preprocess=preprocess)


def smooth():
    """The same examples and a model without kinks.

    Where a ReLU's input is within rounding of zero, two ways to add up the same numbers send its
    gradient two ways, and the runs part: about one in ten of some hundred steps. A smooth model
    keeps them together, so that a tight tolerance finds a step that was lost.
    """

    def model():
        return keras.Sequential(
            [
                keras.Input((28, 28)),
                keras.layers.Flatten(),
                keras.layers.Dense(64, activation="tanh"),
                keras.layers.Dense(64, activation="tanh"),
                keras.layers.Dense(10),
            ]
        )

    return dataclasses.replace(task(), model=model)


def normalized():
    """The same examples and a model with batch statistics, which replicas gather together."""

    def model():
        return keras.Sequential(
            [
                keras.Input((28, 28)),
                keras.layers.Flatten(),
                keras.layers.Dense(16),
                keras.layers.BatchNormalization(synchronized=True),
                keras.layers.Dropout(0.1),
                keras.layers.Dense(10),
            ]
        )

    return dataclasses.replace(task(), model=model)


def large():
    """Examples of a MiB, of which 32 are a chunk where they stream, and not where they do not."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (84, 1 << 20), np.uint8), rng.integers(0, 2, 84, np.int32)
    return dist_train.Task(
        model=lambda: keras.Sequential([keras.Input((16,)), keras.layers.Dense(2)]),
        train=dist_train.Arrays(x[:44], y[:44]),
        validation=dist_train.Arrays(x[44:], y[44:]),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        preprocess=lambda x, y, seed: (tf.cast(x[:, :16], tf.float32) / 255.0, y),
    )


class _Paced:
    """Examples that take so many seconds a read: of a worker's share of an epoch, or of a part."""

    def __init__(self, arrays, seconds):
        self._arrays, self._seconds = arrays, seconds

    def __len__(self):
        return len(self._arrays)

    def __getitem__(self, indices):
        if len(indices) > 1:  # not for a look at the shapes
            time.sleep(self._seconds)
        return self._arrays[indices]


def paced(config):
    """The same task and the same numbers; at 160 steps a second, until it is resumed."""
    plain = task()
    if any(Path(config.workdir, "checkpoints").glob("step-*")):
        return plain
    return dataclasses.replace(plain, train=_Paced(plain.train, 0.1))


def slow():
    """The same, in a minute until Slurm has requeued the job."""
    plain = task()
    seconds = 0.04 if "SLURM_RESTART_COUNT" in os.environ else 1.0
    return dataclasses.replace(plain, train=_Paced(plain.train, seconds))


def own_data(config):
    """Data that depends on who asks: workers that disagree."""
    del config
    return task(begin=_index() * 100)


def _index():
    return json.loads(os.environ["TF_CONFIG"])["task"]["index"]


def dies_in_evaluation():
    """A process that is killed within its second validation, the first time it gets there."""
    plain = task()
    seen = []

    def die():
        seen.append(1)
        if len(seen) == 2 and not os.path.exists("died"):
            open("died", "w").close()
            os.kill(os.getpid(), signal.SIGKILL)

    def preprocess(x, y, seed):
        if seed is None:
            tf.py_function(die, [], [])
        return plain.preprocess(x, y, seed)

    return dataclasses.replace(plain, preprocess=preprocess, test=None)


class _Stuck:
    """Examples that worker 1 waits for in vain after a while."""

    def __init__(self, arrays):
        self._arrays = arrays
        self._reads = 0

    def __len__(self):
        return len(self._arrays)

    def __getitem__(self, indices):
        self._reads += 1
        if _index() == 1 and self._reads > 40:
            threading.Event().wait(600)
        return self._arrays[indices]


def stuck():
    """Training that hangs in worker 1's own code."""
    plain = task()
    return dataclasses.replace(plain, train=_Stuck(plain.train), validation=None, test=None)


def diverging():
    """Training in which worker 1's copy of a weight changes by itself after some steps."""
    plain = task()

    def model():
        built = mlp()
        if _index() == 1:
            first = built.trainable_variables[0]

            def spoil():
                rows = Path("run/metrics.jsonl")
                while not (rows.exists() and rows.stat().st_size):
                    time.sleep(0.05)
                first.value.values[0].assign_add(tf.ones_like(first.value.values[0]) * 1e-3)

            threading.Thread(target=spoil, daemon=True).start()
        return built

    return dataclasses.replace(plain, model=model, validation=None, test=None)
