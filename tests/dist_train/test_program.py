"""What a step computes of some examples."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from dist_train import UsageError
from dist_train.program import Program, check_labels, example_loss, smoothed

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(7, 4)).astype(np.float32)
LABELS = np.array([0, 3, 1, 1, 2, 0, 3])
ONE_HOT = np.eye(4, dtype=np.float32)[LABELS]
SHARE = 0.3


def by_formula(logits):
    logs = tf.nn.log_softmax(logits).numpy()
    return -(ONE_HOT * (1 - SHARE) + SHARE / 4) @ logs.T


@pytest.mark.parametrize(
    ("loss", "labels"),
    [
        (keras.losses.SparseCategoricalCrossentropy(from_logits=True), LABELS),
        (keras.losses.SparseCategoricalCrossentropy(from_logits=True), LABELS[:, np.newaxis]),
        (keras.losses.CategoricalCrossentropy(from_logits=True), ONE_HOT),
    ],
    ids=["sparse", "sparse column", "one hot"],
)
def test_smoothed_labels_follow_the_formula(loss, labels):
    each = example_loss(smoothed(loss, SHARE))(tf.constant(labels), tf.constant(LOGITS))
    np.testing.assert_allclose(each, np.diag(by_formula(LOGITS)), rtol=1e-5)


def test_smoothing_takes_probabilities_and_names_of_classes_too():
    probabilities = tf.nn.softmax(LOGITS)
    each = example_loss(smoothed("SparseCategoricalCrossentropy", SHARE))(LABELS, probabilities)
    np.testing.assert_allclose(each, np.diag(by_formula(LOGITS)), rtol=1e-5)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (keras.losses.MeanSquaredError(), "this task's is MeanSquaredError"),
        ("mse", "this task's is mean_squared_error"),
        (keras.losses.SparseCategoricalCrossentropy(ignore_class=0), "ignore_class=0"),
        (keras.losses.CategoricalCrossentropy(label_smoothing=0.1), "smooths by 0.1 itself"),
    ],
)
def test_a_loss_that_cannot_be_smoothed_is_named(loss, message):
    with pytest.raises(UsageError, match=f"label_smoothing=0.3.*{message}"):
        smoothed(loss, SHARE)


def classifier():
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(4)])


def sums(model, x, y, loss, preprocess=None):
    """Of all rows, as a step computes them."""
    program = Program(model=model, loss=loss, metrics={}, preprocess=preprocess)
    return program.sums((tf.constant(x), tf.constant(y)), tf.range(len(y)), tf.constant(0))[
        1
    ].numpy()


def test_double_precision_is_narrowed_before_anything_of_the_users_sees_it():
    def loss(y, outputs):
        return tf.square(outputs[:, 0] - y)  # fails for two precisions

    model, y = classifier(), LOGITS[:, 0]
    once = sums(model, LOGITS, y, loss)
    twice = sums(model, LOGITS.astype(np.float64), y.astype(np.float64), loss)
    np.testing.assert_array_equal(once, twice)


@pytest.mark.parametrize(
    ("preprocess", "message"),
    [
        (lambda x, y, seed: (x[:3], y), r"shape \(3, 4\); it must keep all 7 examples"),
        (lambda x, y, seed: (x, tf.reduce_sum(y)), r"shape \(\); it must keep all 7"),
        (lambda x, y, seed: None, r"preprocess returned a NoneType; it must return \(x, y\)"),
    ],
)
def test_a_preprocess_that_changes_the_batch_is_named(preprocess, message):
    with pytest.raises(UsageError, match=message):
        sums(classifier(), LOGITS, LABELS, lambda y, outputs: outputs[:, 0], preprocess)


def test_a_loss_that_keras_does_not_know_is_an_error():
    with pytest.raises(UsageError, match="loss='crossentropi' is none of Keras"):
        example_loss("crossentropi")


SPARSE = keras.losses.SparseCategoricalCrossentropy
WITH_4, WITH_MINUS_1 = np.append(LABELS, 4), np.append(LABELS, -1)


@pytest.mark.parametrize("loss", [SPARSE(), "sparse_categorical_crossentropy"])
@pytest.mark.parametrize(("labels", "worst"), [(WITH_4, 4), (WITH_MINUS_1[:, np.newaxis], -1)])
def test_a_label_without_an_output_is_named(loss, labels, worst):
    with pytest.raises(UsageError, match=f"a test label is {worst}, and the model has 4 outputs"):
        check_labels(loss, labels, classifier(), "test")


@pytest.mark.parametrize(
    ("loss", "labels"),
    [
        (SPARSE(), LABELS),
        (SPARSE(ignore_class=-1), WITH_MINUS_1),
        (SPARSE(), WITH_4.astype(np.float32)),
        (SPARSE(), {"a": WITH_4}),
        (keras.losses.MeanSquaredError(), WITH_4),
        (lambda y, outputs: outputs[:, 0], WITH_4),
    ],
)
def test_labels_that_may_be_right_pass(loss, labels):
    check_labels(loss, labels, classifier(), "test")


@pytest.mark.parametrize("kind", [np.uint8, np.int64, bool, np.float32])
def test_a_loss_of_the_users_own_gets_what_keras_would_give_it(kind):
    class Squares(keras.losses.Loss):
        def call(self, y_true, y_pred):
            return tf.reduce_mean(tf.square(y_true - y_pred), -1)

    y = (ONE_HOT > 0).astype(kind)
    each = example_loss(Squares())(tf.constant(y), tf.constant(LOGITS))
    assert np.mean(each) == pytest.approx(float(Squares()(y, LOGITS)), rel=1e-6)


@pytest.mark.parametrize("dtype", ["mixed_float16", "mixed_bfloat16"])
def test_losses_that_layers_add_may_have_two_precisions(dtype):
    layer = keras.layers.Dense(
        4, kernel_regularizer="l2", activity_regularizer="l2", dtype=dtype, name="added"
    )
    model = keras.Sequential([keras.Input((4,)), layer])
    program = Program(model=model, loss=lambda y, outputs: outputs[:, 0] * 0.0, metrics={})
    objective, _ = program.sums((tf.constant(LOGITS), LABELS), tf.range(7), tf.constant(0))
    assert float(objective) == pytest.approx(7 * sum(map(float, model.losses)), rel=1e-2)
