"""An evaluation: exact sums, in the order of the steps where that matters."""

import threading
import time

import keras
import numpy as np
import pytest
import tensorflow as tf

import dist_train
from dist_train import replicas
from dist_train.build import Parts
from dist_train.workers import Workers

X = np.arange(1.0, 51.0, dtype=np.float32)[:, None]


class Counting(keras.layers.Layer):
    """Adds the number of the call."""

    def build(self, shape):
        self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, x):
        self.calls.assign_add(1.0)
        return x + self.calls


def one_weight(*layers):
    dense = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")
    return keras.Sequential([keras.Input((1,)), dense, *layers])


def evaluated(*layers, preprocess=None, **settings):
    """(sums over X in steps of 8, how many of the steps may be under way at once)"""
    task = dist_train.Task(
        model=lambda: one_weight(*layers),
        train=dist_train.Arrays(X, X[:, 0]),
        validation=dist_train.Arrays(X, X[:, 0]),
        loss=lambda y, outputs: outputs[:, 0],
        preprocess=preprocess,
    )
    config = dist_train.Config(batch_size=8, **settings)
    strategy = replicas.create(config.strategy, config.devices, None)
    parts = Parts(task, config, strategy, Workers(strategy, None, stall_timeout_s=60.0))
    inputs = parts.inputs["validation"]
    at_once, while_loop = [], tf.while_loop

    def watched(*args, parallel_iterations, **kwargs):
        at_once.append(parallel_iterations)
        return while_loop(*args, parallel_iterations=parallel_iterations, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tf, "while_loop", watched)
        [(chunk, steps)] = inputs.first_epoch()
        sums = parts.evaluation(inputs.data, chunk, steps)
    return sums, set(at_once)


def test_steps_that_change_nothing_overlap():
    sums, at_once = evaluated()
    assert sums.tolist() == [X.sum(), 50.0]
    assert at_once == {2}


def test_steps_that_count_come_one_after_the_other():
    sums, at_once = evaluated(Counting())
    assert sums.tolist() == [X.sum() + sum(8 * step for step in range(1, 7)) + 2 * 7, 50.0]
    assert at_once == {1}


def test_steps_in_python_come_one_after_the_other():
    seen = []

    def preprocess(x, y, seed):
        del seed
        return tf.ensure_shape(
            tf.py_function(lambda x: seen.append(x[0, 0]) or x, [x], x.dtype), x.shape
        ), y

    sums, at_once = evaluated(preprocess=preprocess)
    assert sums.tolist() == [X.sum(), 50.0]
    # The first time some examples were tried.
    assert [int(first) for first in seen] == [1, 1, 9, 17, 25, 33, 41, 49]
    assert at_once == {1}


@pytest.mark.parametrize("hidden", [False, True])
def test_python_that_claims_to_have_no_state_is_not_entered_twice(hidden):
    lock = threading.Lock()

    def alone(x):
        assert lock.acquire(blocking=False), "another thread is here"
        time.sleep(0.01)
        lock.release()
        return x

    def python(x):
        return tf.numpy_function(alone, [x], x.dtype, stateful=False)

    def preprocess(x, y, seed):
        del seed
        return tf.ensure_shape((tf.function(python) if hidden else python)(x), x.shape), y

    sums, at_once = evaluated(preprocess=preprocess)
    assert sums.tolist() == [X.sum(), 50.0]
    assert at_once == {1}


@pytest.mark.parametrize(("width", "steps"), [(200_000, {2}), (300_000, {1})])
def test_steps_that_hold_much_memory_come_one_after_the_other(width, steps):
    def preprocess(x, y, seed):
        del seed
        return tf.reduce_mean(tf.broadcast_to(x, [x.shape[0], width]), 1, keepdims=True), y

    sums, at_once = evaluated(preprocess=preprocess)
    assert sums[0] == pytest.approx(X.sum(), rel=1e-4)
    assert at_once == steps


def test_steps_of_several_replicas_do_not_overlap():
    sums, at_once = evaluated(strategy="mirrored", devices=2)
    assert sums.tolist() == [X.sum(), 50.0]
    assert at_once == {1}


@pytest.mark.filterwarnings("ignore:Even though:UserWarning")  # tf.data's are not ours to watch
def test_functions_that_run_eagerly_show_their_values(workdir):
    seen = []

    def loss(y, outputs):
        seen.append(int(y[0]))
        return outputs[:, 0] - y

    examples = dist_train.Arrays(X, X[:, 0])
    task = dist_train.Task(model=one_weight, train=examples, validation=examples, loss=loss)
    tf.config.run_functions_eagerly(True)
    try:
        config = dist_train.Config(workdir=workdir, batch_size=8, epochs=1, shuffle=False)
        dist_train.train(task, config)
    finally:
        tf.config.run_functions_eagerly(False)
    # Three times some examples were tried.
    assert seen == [1, 1, 1] + [1, 9, 17, 25, 33, 41, 49] * 2
