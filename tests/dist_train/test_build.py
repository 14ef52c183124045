"""What a task's functions are tried for, and models whose weights a call must make."""

import contextlib
import logging

import keras
import numpy as np
import pytest
import tensorflow as tf

import dist_train

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 5)).astype(np.float32)
Y = (X.sum(axis=1) > 0).astype(np.int32)
REAL = X.sum(axis=1)
STRATEGIES = [{}, {"strategy": "mirrored", "devices": 2}]
each_strategy = pytest.mark.parametrize("strategy", STRATEGIES)

crossentropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
square = keras.losses.mean_squared_error


def model(outputs=1):
    return keras.Sequential([keras.Input((5,)), keras.layers.Dense(outputs)])


def train(workdir, *, y=REAL, outputs=1, **settings):
    names = {"strategy", "devices", "batch_size"}
    config = {name: settings.pop(name) for name in names & set(settings)}
    fields = {"model": lambda: model(outputs), "train": dist_train.Arrays(X, y), "loss": "mse"}
    task = dist_train.Task(**(fields | settings))
    return dist_train.train(
        task, dist_train.Config(workdir=str(workdir), epochs=1, **{"batch_size": 16, **config})
    )


class Halving(keras.optimizers.schedules.LearningRateSchedule):
    def __call__(self, step):
        return 0.1 * 0.5 ** tf.cast(step, tf.float32)


def weighted(y, outputs):
    return tf.gather([1.0, 4.0], y) * crossentropy(y, outputs)


def every_pair(y, outputs):
    return tf.reduce_mean(tf.square(y - outputs), -1)


def in_batch(y, outputs):
    return tf.square(y - outputs[:, 0]) + tf.reduce_mean(outputs)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"loss": weighted, "y": Y, "outputs": 2}, "loss"),
        ({"loss": every_pair}, "loss"),
        ({"loss": in_batch}, "loss"),
        ({"metrics": {"error": every_pair}}, "metric error"),
    ],
)
def test_a_value_that_depends_on_other_examples_is_refused(workdir, changes, name):
    with pytest.raises(
        dist_train.UsageError,
        match=rf"the {name} of an example is [\d.]+ beside 4 others and [\d.]+ beside copies",
    ):
        train(workdir, **changes)


def test_a_value_that_depends_on_others_of_a_whole_batch_is_told_of(workdir, caplog):
    with caplog.at_level(logging.WARNING):
        train(workdir, loss=in_batch, batch_size=20)
    assert "beside copies of itself" in caplog.text
    assert "this run has one replica and no padding, so it goes on" in caplog.text


def test_outputs_that_are_no_examples_pass(workdir):
    def made():
        inputs = keras.Input((5,))
        embedded = keras.layers.Dense(4)(inputs)
        prototypes = Prototypes()(embedded)
        return keras.Model(inputs, {"e": embedded, "p": prototypes})

    def loss(y, outputs):
        apart = tf.square(outputs["e"][:, None] - outputs["p"][None])
        return tf.reduce_min(tf.reduce_sum(apart, -1), 1)

    train(workdir, model=made, loss=loss)


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": crossentropy, "y": Y, "outputs": 2},
        {"loss": lambda y, o: square(y[:, None], o)},
        {"loss": lambda y, o: tf.square(y - tf.squeeze(o))},
        {"optimizer": lambda: keras.optimizers.SGD(Halving())},
        {"optimizer": lambda: keras.optimizers.SGD(lambda: 0.01)},
        {"loss": lambda y, o: square(y[:, None], o) + tf.random.uniform([]), "y": REAL},
        {"y": (REAL, np.abs(X[:, 0])), "loss": lambda y, o: y[1] * square(y[0][:, None], o)},
        {"y": np.full(40, np.nan, np.float32), "loss": every_pair},
    ],
)
def test_a_value_of_the_example_alone_passes(workdir, changes):
    nan = isinstance(changes.get("y"), np.ndarray) and np.isnan(changes["y"]).any()
    fails = pytest.raises(dist_train.RunError, match="is nan")
    with fails if nan else contextlib.nullcontext():
        train(workdir, **changes)


@pytest.mark.parametrize("shape", [(4,), (None, 5), (5, 1, 1)])
def test_examples_that_the_model_does_not_take_are_refused_with_both_shapes(workdir, shape):
    def other():
        inputs = keras.Input(shape)
        return keras.Model(inputs, keras.layers.Dense(1)(inputs))

    with pytest.raises(dist_train.UsageError) as refused:
        train(workdir, model=other)
    assert f"takes examples of shape {shape}, and those of Task.train are" in str(refused.value)
    assert "of shape (5,) when they reach it; reshape" in str(refused.value)


def test_a_sum_over_the_batch_is_refused(workdir):
    loss = keras.losses.MeanSquaredError(reduction="sum")
    with pytest.raises(dist_train.UsageError, match=r"has reduction='sum', and here.*mean"):
        train(workdir, loss=loss)


def test_one_loss_for_two_outputs_is_refused(workdir):
    def two():
        inputs = keras.Input((5,))
        return keras.Model(inputs, {"p": keras.layers.Dense(1)(inputs), "q": inputs})

    loss = keras.losses.MeanSquaredError()
    with pytest.raises(dist_train.UsageError, match="is for one output, and the model has 2"):
        train(workdir, model=two, loss=loss)


def test_a_metric_with_an_axis_too_many_is_told_what_to_do(workdir):
    metrics = {"right": lambda y, outputs: tf.cast(tf.equal(y[:, None], outputs), tf.float32)}
    with pytest.raises(dist_train.UsageError, match=r"shape \(5, 1\).*reduce the other axes"):
        train(workdir, metrics=metrics)


class Prototypes(keras.layers.Layer):
    def build(self, shape):
        self.all = self.add_weight(shape=(3, 4))

    def call(self, x):
        return self.all + 0.0 * tf.reduce_sum(x)


class Counting(keras.layers.Layer):
    """Counts its calls, and draws a number in each."""

    def build(self, shape):
        self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False)
        self.seeds = keras.random.SeedGenerator(7)

    def call(self, x):
        self.calls.assign_add(1.0)
        return x + 0.0 * keras.random.uniform((), seed=self.seeds)


@each_strategy
def test_what_is_tried_leaves_no_trace(workdir, strategy):
    def counting():
        dense = keras.layers.Dense(1)
        return keras.Sequential([keras.Input((5,)), Counting(), dense])

    result = train(workdir, model=counting, **strategy)
    layer = result.model.layers[0]
    assert layer.calls.numpy() == 3.0  # steps
    counter = layer.seeds.state.numpy()[1]
    assert counter == 3 * (result.step // 3)


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.inner = keras.layers.Dense(8, activation="relu")
        self.drop = keras.layers.Dropout(0.1)
        self.last = keras.layers.Dense(1)

    def call(self, x, training=False):
        return self.last(self.drop(self.inner(x), training=training))


def said_to_be_built():
    made = Subclassed()
    made.build((None, 5))
    return made


@pytest.mark.filterwarnings("ignore:.build... was called:UserWarning")
@each_strategy
@pytest.mark.parametrize(
    "made", [Subclassed, said_to_be_built, lambda: keras.Sequential([keras.layers.Dense(1)])]
)
def test_a_model_without_weights_is_called_on_an_example(workdir, strategy, made):
    result = train(workdir, model=made, preprocess=lambda x, y, seed: (x * 2.0, y), **strategy)
    assert result.model.count_params() > 0
    if isinstance(result.model, keras.Sequential):
        assert result.model.input_shape == (None, 5)
    exported = tf.saved_model.load(f"{workdir}/saved_model")
    np.testing.assert_allclose(
        exported.serve(X[:3]), result.model(X[:3], training=False), rtol=1e-5, atol=1e-6
    )


def test_a_model_that_no_example_fits_is_named(workdir):
    def made():
        first = keras.layers.Reshape((7, 7))
        return keras.Sequential([first, keras.layers.Flatten(), keras.layers.Dense(1)])

    with pytest.raises(dist_train.UsageError, match=r"has no weights yet, and cannot be called"):
        train(workdir, model=made)
