"""What a source gives, and what it should have given."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

import dist_train
from dist_train import UsageError
from dist_train.input import Input


class Given:
    """A source of 8 examples that answers with what a function makes of the indices."""

    def __init__(self, answer):
        self._answer = answer

    def __len__(self):
        return 8

    def __getitem__(self, indices):
        return self._answer(indices)


def scalar(indices):
    return float(indices), 0


def gone(indices):
    if len(indices) > 1:
        raise OSError("the disk is gone")
    return indices, indices


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (lambda i: i, dist_train.UsageError, r"gave a ndarray; it must give \(x, y\)"),
        (scalar, dist_train.UsageError, "Given.__getitem__ failed for an array of 1 indices"),
        (lambda i: (i, 3), dist_train.UsageError, r"an array of shape \[\] for 1 indices"),
        (lambda i: (i, i[: max(1, len(i) - 1)]), dist_train.UsageError, r"shape \[7\] for 8 ind"),
        (gone, OSError, "^the disk is gone$"),
    ],
)
def test_a_source_that_gives_something_else_is_named(answer, error, message):
    with pytest.raises(error, match=message):
        next(
            Input(Given(answer), tf.distribute.get_strategy(), resident=False, batch_size=4).chunks(
                0
            )
        )


class Texts:
    """Short ones at first; `as_objects` as TensorFlow gives strings."""

    def __init__(self, length, as_objects):
        self.length, self.as_objects = length, as_objects

    def __len__(self):
        return 1_000_000

    def __getitem__(self, indices):
        texts = [b"x" * (1 if index == 0 else self.length) for index in indices]
        kind = object if self.as_objects else "S"
        return np.array(texts, kind), np.zeros(len(indices), np.int32)


@pytest.mark.parametrize("as_objects", [False, True])
def test_a_chunk_of_long_texts_holds_few(as_objects):
    inputs = Input(
        Texts(100_000, as_objects), tf.distribute.get_strategy(), resident=False, batch_size=64
    )
    assert 1 < inputs.schedule.chunk_steps <= (32 << 20) / 90_000 / 64
    short = Input(Texts(2, as_objects), tf.distribute.get_strategy(), resident=False, batch_size=64)
    assert short.schedule.chunk_steps == 4096 // 64


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (lambda i: np.zeros((len(i), 1 + i[0] // 8)), r"gave examples of shape \[2\] and type"),
        (lambda i: np.zeros((len(i), 1), "d" if i[0] == 0 else "f"), "and before of .1. and float"),
    ],
)
def test_a_source_whose_examples_differ_is_named(x, message):
    class Source:
        def __len__(self):
            return 16

        def __getitem__(self, indices):
            return x(indices), indices

    inputs = Input(Source(), tf.distribute.get_strategy(), resident=False, batch_size=8)
    inputs.schedule = dataclasses.replace(inputs.schedule, chunk_steps=1)
    with pytest.raises(UsageError, match=message):
        for _ in zip(range(3), inputs.chunks(0), strict=False):
            pass
