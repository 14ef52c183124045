"""Layers of many kinds train to the same numbers on one, two and three replicas."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from equivalence import EXAMPLES, STRATEGIES, X, Y, assert_same, run, runs_alike

import dist_train

EVEN = 72  # divides by batches of 12, and those by 2 and 3 replicas: nothing is padded
TOKENS = np.random.default_rng(1).integers(0, 20, (len(X), 4)).astype(np.int32)


def task(model, x=X, examples=EXAMPLES, **changes):
    fields = {
        "model": model,
        "train": dist_train.Arrays(x[:examples], Y[:examples]),
        "validation": dist_train.Arrays(x[EXAMPLES:], Y[EXAMPLES:]),
        "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    }
    return dist_train.Task(**(fields | changes))


class Scale(keras.layers.Layer):
    """A factor for each feature, and a count of the training steps."""

    def build(self, shape):
        self.factors = self.add_weight(shape=(shape[-1],), initializer="ones")
        self.steps = self.add_weight(
            shape=(), dtype="int32", initializer="zeros", trainable=False, name="steps"
        )

    def call(self, x, training=False):
        if training:
            self.steps.assign_add(1)
        return x * self.factors


class Centered(keras.layers.Layer):
    """Adds a loss for the mean square of what passes through it."""

    def call(self, x):
        self.add_loss(0.3 * keras.ops.mean(keras.ops.square(x)))
        return x


def embedding():
    return keras.Sequential(
        [
            keras.Input((4,), dtype="int32"),
            keras.layers.Embedding(20, 3),
            keras.layers.GlobalAveragePooling1D(),
            Scale(),
            keras.layers.Dense(2, kernel_regularizer=keras.regularizers.L2(0.1)),
        ]
    )


@pytest.mark.slow
def test_embeddings_custom_weights_and_counters_are_alike_on_padded_batches(tmp_path):
    made = task(embedding, TOKENS)
    found = runs_alike(tmp_path, made, optimizer="adam")
    (steps,) = [w for w in found.weights if w.dtype == np.int32]
    assert steps == found.result.step == 12
    # XLA knows no sparse rows; two replicas would take it seconds to compile.
    assert_same(found, run(tmp_path / "xla", made, optimizer="adam", jit_compile="true"))


def two_heads():
    """A frozen layer, synchronized batch statistics, frozen ones, and two outputs."""
    inputs = keras.Input((6,))
    frozen = keras.layers.Dense(8, activation="tanh", trainable=False, name="frozen")
    hidden = keras.layers.BatchNormalization(synchronized=True, momentum=0.5)(frozen(inputs))
    hidden = keras.layers.BatchNormalization(trainable=False)(hidden)
    outputs = {"label": keras.layers.Dense(2)(hidden), "sum": keras.layers.Dense(1)(hidden)}
    return keras.Model(inputs, outputs)


def two_losses(y, outputs):
    label = keras.losses.sparse_categorical_crossentropy(
        y["label"], outputs["label"], from_logits=True
    )
    return label + 0.1 * tf.square(outputs["sum"][:, 0] - y["sum"])


@pytest.mark.slow
def test_synchronized_statistics_frozen_layers_and_two_outputs_are_alike(tmp_path):
    y = {"label": Y, "sum": X.sum(axis=1)}
    even = dist_train.Arrays(X[:EVEN], {name: array[:EVEN] for name, array in y.items()})
    made = task(two_heads, train=even, validation=even, loss=two_losses)
    found = runs_alike(tmp_path, made, batch_size=12)
    keras.utils.set_random_seed(0)
    before = two_heads().get_layer("frozen").get_weights()
    np.testing.assert_array_equal(
        found.result.model.get_layer("frozen").get_weights()[0], before[0]
    )


def penalized():
    """Losses of all kinds: of the weights, of an activity, and added by a layer."""
    hidden = keras.layers.Dense(
        8, activation="tanh", activity_regularizer=keras.regularizers.L2(0.3),
        kernel_regularizer=keras.regularizers.L1(0.01),
    )  # fmt: skip
    return keras.Sequential([keras.Input((6,)), hidden, Centered(), keras.layers.Dense(2)])


@pytest.mark.slow
def test_losses_that_layers_add_are_alike_and_as_in_a_loop_by_hand(tmp_path):
    settings = {"batch_size": 12, "shuffle": False, "epochs": 1}
    made = task(penalized, examples=EVEN)
    found = runs_alike(tmp_path, made, **settings)
    assert_same(found, run(tmp_path / "parts", made, **settings, gradient_accumulation=3))
    keras.utils.set_random_seed(0)
    model = penalized()
    optimizer = keras.optimizers.SGD(0.1)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    for begin in range(0, EVEN, 12):
        with tf.GradientTape() as tape:
            outputs = model(X[begin : begin + 12], training=True)
            total = loss(Y[begin : begin + 12], outputs) + tf.add_n(model.losses)
        gradients = tape.gradient(total, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
    for mine, theirs in zip(found.weights, model.get_weights(), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("regularized", [True, False])
def test_a_loss_that_padding_would_change_is_refused(tmp_path, strategy, regularized):
    def model():
        regularizer = "l2" if regularized else None
        layer = keras.layers.Dense(
            2, activity_regularizer=regularizer, name="own" if regularized else "plain"
        )
        return keras.Sequential(
            [keras.Input((6,)), layer, *([] if regularized else [Centered(name="own")])]
        )

    # The last batch has 8 of 12 examples.
    with pytest.raises(dist_train.UsageError) as caught:
        run(tmp_path, task(model), batch_size=12, **STRATEGIES[strategy])
    message = str(caught.value)
    assert message.startswith("own adds a loss of its own")
    assert "batch_size=12 must divide 80 examples" in message


@pytest.mark.slow
def test_dropout_draws_the_same_masks_in_every_input_mode(tmp_path):
    def model():
        layers = [keras.layers.Dense(8), keras.layers.Dropout(0.5, seed=3), keras.layers.Dense(2)]
        return keras.Sequential([keras.Input((6,)), *layers])

    settings = STRATEGIES["mirrored-2"]  # with another number the masks may differ
    one = run(tmp_path / "one", task(model), **settings)
    assert_same(one, run(tmp_path / "stream", task(model), **settings, input="stream"))
