"""What a step computes of some examples."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from dist_train import UsageError
from dist_train.program import example_loss, smoothed

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
