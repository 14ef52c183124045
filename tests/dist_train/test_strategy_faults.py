"""What Keras and TensorFlow get wrong under a strategy, each with the right answer."""

from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import dist_train
from dist_train import layers
from dist_train.input import Input
from dist_train.program import Program
from dist_train.rows import read_rows
from dist_train.step import TrainLoop

TWO = {"strategy": "mirrored", "devices": 2}
BOTH = pytest.mark.parametrize("strategy", [{}, TWO], ids=["one-replica", "two-replicas"])


def one_weight():
    """y = w x, without bias, from w = 0."""
    return keras.Sequential(
        [keras.Input((1,)), keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")]
    )


def slope(y, outputs):
    """A loss whose gradient by w is x: minus the output."""
    return -outputs[:, 0]


def train(workdir, strategy, task, **settings):
    config = dist_train.Config(
        workdir=str(workdir),
        **{"batch_size": 4, "epochs": 1, "shuffle": False, **settings},
        **strategy,
    )
    return dist_train.train(task, config)


def fit_one_weight(workdir, strategy, x, *, loss=slope, y=None, **settings):
    x = np.asarray(x, np.float32)[:, None]
    y = np.zeros(len(x), np.float32) if y is None else y
    task = dist_train.Task(model=one_weight, train=dist_train.Arrays(x, y), loss=loss)
    result = train(workdir, strategy, task, **settings)
    return float(result.model.get_weights()[0][0, 0]), result


@BOTH
def test_a_partial_batch_counts_as_what_it_is(workdir, strategy):
    weight, _ = fit_one_weight(workdir, strategy, [1] * 5, learning_rate=0.1)
    assert weight == pytest.approx(0.2, rel=1e-6)


@BOTH
def test_clipping_sees_the_reduced_gradient(workdir, strategy):
    weight, _ = fit_one_weight(workdir, strategy, [7, 3, 5, 1], learning_rate=1.0, clip_norm=1.0)
    assert weight == pytest.approx(1.0, rel=1e-6)


@BOTH
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_accumulation_changes_nothing(workdir, strategy, parts):
    weight, _ = fit_one_weight(
        workdir, strategy, [7, 3, 5, 1, 4], learning_rate=0.1, gradient_accumulation=parts
    )
    assert weight == pytest.approx(0.1 * 4 + 0.1 * 4, rel=1e-6)


@BOTH
def test_an_overflow_in_one_replica_leaves_out_the_step_on_all(workdir, strategy):
    # The loss stays finite, its gradient does not: in the first batch's last column, which is the
    # second replica's.
    @tf.custom_gradient
    def infinite_gradient(value, bad):
        return value, lambda upstream: (tf.where(bad, np.inf, 1.0) * upstream, None)

    def finite_loss(y, outputs):
        return -infinite_gradient(outputs[:, 0], y > 0)

    y = np.array([0, 0, 0, 1, 0, 0, 0, 0], np.float32)
    weight, result = fit_one_weight(
        workdir,
        strategy,
        [0.25] * 8,
        loss=finite_loss,
        y=y,
        learning_rate=0.1,
        dtype="mixed_float16",
    )
    assert weight == pytest.approx(0.025, rel=1e-3)  # the second step alone
    assert int(result.step) == 2
    values = dict(tf.train.list_variables(f"{workdir}/checkpoints/step-00000002/state"))
    (name,) = (name for name in values if name.startswith("scale/"))
    scale = tf.train.load_variable(f"{workdir}/checkpoints/step-00000002/state", name)
    assert scale == 2.0**14


@BOTH
def test_a_loss_object_is_not_divided_by_the_replicas(workdir, strategy):
    x = np.ones(4, np.float32)
    mean_squared = keras.losses.MeanSquaredError()
    fit_one_weight(
        workdir, strategy, x, loss=mean_squared, y=np.ones((4, 1), np.float32), learning_rate=0.0,
        log_steps=1,
    )  # fmt: skip
    (row,) = (r for r in read_rows(metrics_file(workdir)) if r["kind"] == "train")
    assert row["loss"] == pytest.approx(1.0, rel=1e-6)


def metrics_file(workdir):
    return Path(workdir) / "metrics.jsonl"


def dropout_model():
    return keras.Sequential([keras.Input((64,)), keras.layers.Dropout(0.5)])


def test_each_replica_draws_a_dropout_mask_of_its_own():
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = dropout_model()
    layers.separate_randomness(strategy, model)

    @tf.function
    def masks():
        return strategy.run(lambda: model(tf.ones((1, 64)), training=True))

    one, other = (mask.numpy() for mask in strategy.experimental_local_results(masks()))
    assert not np.array_equal(one, other)


@BOTH
def test_dropout_goes_on_where_a_resume_left_it(tmp_path, strategy):
    x = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)

    def model():
        return keras.Sequential(
            [keras.Input((8,)), keras.layers.Dropout(0.5), keras.layers.Dense(1)]
        )

    def task():
        return dist_train.Task(
            model=model, train=dist_train.Arrays(x, x[:, :1]), loss="mean_squared_error"
        )

    settings = {"batch_size": 8, "learning_rate": 0.05}
    whole = train(tmp_path / "whole", strategy, task, epochs=4, **settings)
    train(tmp_path / "parts", strategy, task, epochs=2, **settings)
    parts = train(tmp_path / "parts", strategy, task, epochs=4, **settings)
    for a, b in zip(whole.model.get_weights(), parts.model.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def normalized(synchronized):
    def model():
        return keras.Sequential(
            [
                keras.Input((3,)),
                keras.layers.BatchNormalization(synchronized=synchronized),
                keras.layers.Dense(1),
            ]
        )

    return model


def batch_norm_task(examples, synchronized):
    x = np.random.default_rng(1).normal(size=(examples, 3)).astype(np.float32)
    return dist_train.Task(
        model=normalized(synchronized),
        train=dist_train.Arrays(x, x[:, :1]),
        loss="mean_squared_error",
    )


def test_batch_statistics_of_a_padded_batch_are_refused(workdir):
    with pytest.raises(
        dist_train.UsageError, match=r"must divide 10 examples.*use 1 or 2 or 5 or 10"
    ):
        train(
            workdir,
            TWO | {"devices": 1, "strategy": "mirrored"},
            batch_norm_task(10, False),
            batch_size=4,
        )


def test_batch_statistics_of_parts_of_a_batch_are_refused(workdir):
    with pytest.raises(dist_train.UsageError, match="--gradient_accumulation=1"):
        train(workdir, {}, batch_norm_task(8, False), gradient_accumulation=2)


def test_batch_statistics_of_each_replica_alone_are_refused(workdir):
    with pytest.raises(dist_train.UsageError, match="synchronized=True"):
        train(workdir, TWO, batch_norm_task(8, False))


def test_synchronized_batch_statistics_equal_those_of_one_replica(tmp_path):
    one = train(tmp_path / "one", {}, batch_norm_task(16, True), learning_rate=0.1)
    two = train(tmp_path / "two", TWO, batch_norm_task(16, True), learning_rate=0.1)
    for a, b in zip(one.model.get_weights(), two.model.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_replicas_that_hold_different_weights_are_found():
    strategy = tf.distribute.MirroredStrategy(["CPU:2", "CPU:3"])
    with strategy.scope():
        model = one_weight()
        optimizer = keras.optimizers.SGD(0.1)
        optimizer.build(model.trainable_variables)
    program = Program(model=model, loss=slope, metrics={})
    loop = TrainLoop(strategy, program, optimizer, log_steps=10, jit_compile=False)
    x = np.ones((8, 1), np.float32)
    inputs = Input(dist_train.Arrays(x, x[:, 0]), strategy, resident=True, batch_size=4)
    chunk = next(inputs.chunks(0))
    [line] = loop(inputs.data, chunk, 0, 1)
    assert not line.diverged
    model.trainable_variables[0].value.values[1].assign([[5.0]])
    [line] = loop(inputs.data, chunk, 0, 2)
    assert line.diverged
    assert line.steps == 1
