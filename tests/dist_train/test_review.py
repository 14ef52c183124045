"""What a classifier confuses, and what it gets most wrong."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from dist_train import Arrays, Dataset
from dist_train.program import Program, example_loss
from dist_train.review import examine, probabilities

RNG = np.random.default_rng(0)
CLASSES, EXAMPLES = 4, 103


def scores(x):
    """The fixed classifier of these tests: the first pixels of a picture are its logits."""
    return x[:, 0, :CLASSES]


def program(outputs=scores, **changes: Any) -> Program:
    inputs = keras.Input((8, 8))
    model = keras.Model(inputs, keras.layers.Lambda(outputs)(inputs))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return Program(**{"model": model, "loss": example_loss(loss), "metrics": {}, **changes})


def examples():
    x = RNG.normal(size=(EXAMPLES, 8, 8)).astype(np.float32)
    return x, RNG.integers(0, CLASSES, EXAMPLES)


@pytest.mark.parametrize("batch_size", [1, 50, 103, 500])
def test_each_example_counts_once_whatever_the_batch(batch_size):
    x, y = examples()
    found = examine(Arrays(x, y), program(), batch_size=batch_size, seconds=60)
    expected = np.zeros((CLASSES, CLASSES), int)
    for label, guess in zip(y, scores(x).argmax(axis=1), strict=True):
        expected[label, guess] += 1
    np.testing.assert_array_equal(found.confusion, expected)
    assert found.examples == found.of == EXAMPLES


def test_labels_may_stand_in_a_column():
    x, y = examples()
    column, row = (
        examine(Arrays(x, labels), program(), batch_size=32, seconds=60)
        for labels in (y[:, None], y)
    )
    np.testing.assert_array_equal(column.confusion, row.confusion)
    assert column.mistakes == row.mistakes


def test_the_worst_mistakes_are_those_of_the_greatest_loss():
    x, y = examples()
    found = examine(Arrays(x, y), program(), batch_size=32, seconds=60)
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(y, scores(x)).numpy()
    wrong = np.flatnonzero(scores(x).argmax(axis=1) != y)
    worst = sorted(wrong, key=lambda index: -losses[index])[:25]
    assert [mistake.index for mistake in found.mistakes] == worst
    for mistake, picture in zip(found.mistakes, found.pictures, strict=True):
        np.testing.assert_array_equal(picture, x[mistake.index])
        assert mistake.label == y[mistake.index]
        chances = tf.nn.softmax(scores(x)[mistake.index]).numpy()
        assert mistake.guess == chances.argmax()
        assert mistake.probability == pytest.approx(chances.max(), rel=1e-5)


def test_preprocessing_is_that_of_an_evaluation():
    x, y = examples()

    def negate(x, y, seed):
        assert seed is None
        return -x, y

    found = examine(Arrays(x, y), program(preprocess=negate), batch_size=32, seconds=60)
    assert np.trace(found.confusion) == np.sum(scores(-x).argmax(axis=1) == y)


def test_no_mistake_has_no_picture():
    x, _ = examples()
    y = scores(x).argmax(axis=1)
    found = examine(Arrays(x, y), program(), batch_size=32, seconds=60)
    assert found.mistakes == found.pictures == ()


def test_a_classifier_of_something_else_than_images_has_no_pictures():
    x, y = examples()
    inputs = keras.Input((CLASSES,))
    flat = program(model=keras.Model(inputs, keras.layers.Lambda(lambda x: x)(inputs)))
    found = examine(Arrays(x[:, 0, :CLASSES], y), flat, batch_size=32, seconds=60)
    assert found.mistakes
    assert found.pictures == ()


@pytest.mark.parametrize(
    ("y", "outputs"),
    [
        (np.zeros(EXAMPLES, np.float32), scores),
        (np.zeros((EXAMPLES, 2), int), scores),
        ({"a": np.zeros(EXAMPLES, int)}, scores),
        (np.zeros(EXAMPLES, int), lambda x: x[:, 0, :1]),
        (np.zeros(EXAMPLES, int), lambda x: x),
        (np.full(EXAMPLES, 7), scores),
    ],
    ids=["real", "several", "named", "one output", "sequence", "label beyond the outputs"],
)
def test_what_is_no_classification_is_passed_over(y, outputs):
    x, _ = examples()
    anything = program(outputs, loss=lambda y, outputs: tf.zeros(32))
    assert examine(Arrays(x, y), anything, batch_size=32, seconds=60) is None


def test_what_takes_too_long_is_cut_short_and_says_so():
    x, y = examples()
    found = examine(Arrays(x, y), program(), batch_size=32, seconds=0)
    assert (found.examples, found.of) == (32, EXAMPLES)
    assert found.confusion.sum() == 32


def test_of_very_many_examples_a_part_is_read_evenly():
    class Many:
        def __len__(self):
            return 10**9

        def __getitem__(self, indices):
            seen.append(indices)
            return np.zeros((len(indices), 8, 8), np.float32), np.zeros(len(indices), int)

    seen: list[np.ndarray] = []
    found = examine(Many(), program(), batch_size=10_000, seconds=60)
    assert (found.examples, found.of) == (50_000, 10**9)
    assert seen[-1][-1] == 10**9 - 1
    assert np.unique(np.concatenate(seen[1:])).size == 50_000


def test_probabilities_are_taken_as_they_are_and_logits_by_their_softmax():
    chances = np.array([[0.25, 0.75], [1.0, 0.0]])
    np.testing.assert_array_equal(probabilities(chances), chances)
    logits = np.array([[1.0, 1000.0], [-3.0, -3.0]])
    np.testing.assert_allclose(probabilities(logits), [[0.0, 1.0], [0.5, 0.5]])


def test_double_precision_and_tensors_are_as_in_an_evaluation():
    x, y = examples()

    class Tensors:
        def __len__(self):
            return EXAMPLES

        def __getitem__(self, indices):
            return tf.constant(x.astype(np.float64)[indices]), tf.constant(y[indices])

    one = tf.constant(1.0)
    shifted = program(preprocess=lambda x, y, seed: (x - one, y))
    plain, found = (
        examine(source, shifted, batch_size=32, seconds=60) for source in (Arrays(x, y), Tensors())
    )
    np.testing.assert_array_equal(found.confusion, plain.confusion)
    assert [m.index for m in found.mistakes] == [m.index for m in plain.mistakes]


def test_a_dataset_is_read_once(monkeypatch):
    x, y = examples()
    read = []

    def make():
        whole = tf.data.Dataset.from_tensor_slices((x, y))
        return whole.map(
            lambda *example: tf.numpy_function(count, example, (x.dtype, y.dtype))
        ).map(lambda x, y: (tf.ensure_shape(x, [8, 8]), tf.ensure_shape(y, [])))

    def count(x, y):
        read.append(y)
        return x, y

    plain, found = (
        examine(source, program(), batch_size=32, seconds=60)
        for source in (Arrays(x, y), Dataset(make, examples=EXAMPLES))
    )
    np.testing.assert_array_equal(found.confusion, plain.confusion)
    assert found.mistakes == plain.mistakes
    np.testing.assert_array_equal(found.pictures, plain.pictures)
    assert len(read) < EXAMPLES + 64  # and a look at the first ones
    monkeypatch.setattr("dist_train.review._MOST_EXAMPLES", 40)
    beginning = examine(Dataset(make, examples=EXAMPLES), program(), batch_size=20, seconds=60)
    assert (beginning.examples, beginning.of) == (64, EXAMPLES)
