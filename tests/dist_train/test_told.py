"""What a run tells of: where its time goes, what has changed, what is wrong with it."""

import itertools
import logging
import threading
import time
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from small_run import X, Y, model, rows, train

import dist_train


def test_the_rate_counts_the_wait_for_the_input(workdir):
    class Slow:
        def __len__(self):
            return 80

        def __getitem__(self, indices):
            time.sleep(0.4 if len(indices) > 1 else 0.0)
            return X[indices], Y[indices]

    train(workdir, {"train": Slow(), "validation": None, "test": None}, epochs=12, log_steps=5)
    rates = [row["examples_per_second"] for row in rows(workdir, "train")]
    # Chunks of 80 examples, of which some are read ahead while the first call compiles.
    assert all(rate < 80 / 0.2 for rate in rates[6:])


@pytest.mark.parametrize(("eval_epochs", "steps"), [(1, [5, 10, 15, 20]), (2, [10, 20]), (0, [20])])
def test_beside_each_validation_is_a_line_of_the_training(workdir, eval_epochs, steps):
    train(workdir, epochs=4, log_steps=200, eval_epochs=eval_epochs)
    assert [row["step"] for row in rows(workdir, "train")] == steps
    assert [row["step"] for row in rows(workdir, "validation")] == (steps if eval_epochs else [])


def test_without_validations_the_lines_come_as_asked_for(workdir):
    train(workdir, {"validation": None}, epochs=4, log_steps=15)
    assert [row["step"] for row in rows(workdir, "train")] == [15, 20]


def test_a_task_that_has_changed_is_told_of(workdir, caplog):
    train(workdir, {"optimizer": lambda: keras.optimizers.SGD(0.01)}, learning_rate=0.001)
    with caplog.at_level(logging.WARNING):
        train(workdir, {"optimizer": lambda: keras.optimizers.SGD(0.01)}, learning_rate=0.001)
    assert "begun with" not in caplog.text
    changes = {
        "optimizer": lambda: keras.optimizers.SGD(0.1),
        "train": dist_train.Arrays(2 * X[:80], Y[:80]),
    }
    with caplog.at_level(logging.WARNING):
        train(workdir, changes, epochs=3, learning_rate=0.001)
    assert "other settings of the task (train examples, optimizer): it goes on" in caplog.text


def test_a_task_of_texts_is_known_again(workdir, caplog):
    words = np.array(["a", "bb", "ccc", "dd"] * 10)

    def length(x, y, seed):
        del seed
        return tf.cast(tf.strings.length(x), tf.float32)[:, None], y

    changes = {
        "model": lambda: keras.Sequential([keras.Input((1,)), keras.layers.Dense(2)]),
        "preprocess": length, "validation": None, "test": None,
    }  # fmt: skip
    with caplog.at_level(logging.WARNING):
        for epochs in (1, 2):
            train(workdir, {**changes, "train": dist_train.Arrays(words, Y[:40])}, epochs=epochs)
        assert "begun with" not in caplog.text
        train(workdir, {**changes, "train": dist_train.Arrays(words[1:], Y[1:40])}, epochs=3)
    assert "other settings of the task (train examples)" in caplog.text


def test_a_validation_that_is_not_finite_is_told_of(workdir, caplog):
    held_out = dist_train.Arrays(np.full_like(X[80:], np.nan), Y[80:])
    with caplog.at_level(logging.WARNING):
        train(workdir, {"validation": held_out}, epochs=1)
    assert "the validation loss of step 5 is nan" in caplog.text


def test_a_profile_of_steps_that_never_come_is_told_of(workdir, caplog):
    with caplog.at_level(logging.WARNING):
        train(workdir, epochs=1, profile_steps="100,120")
    assert "no profile: the run had no steps 100 to 120" in caplog.text


class Lines(logging.Handler):
    """Counts the lines of training."""

    def __init__(self):
        super().__init__()
        self.texts = []
        self._changed = threading.Condition()

    def emit(self, record):
        if "batch loss" in record.getMessage():
            with self._changed:
                self.texts.append(record.getMessage())
                self._changed.notify_all()

    def wait_for(self, count):
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.texts) >= count, timeout=30)


@pytest.mark.parametrize("slow", ["input", "training"])
def test_an_input_that_is_the_bottleneck_is_told(tmp_path, caplog, slow):
    lines = Lines()
    chunks = itertools.count()

    class Source:
        def __len__(self):
            return 80

        def __getitem__(self, indices):
            if slow == "input" and len(indices) == 80:  # a chunk, here an epoch, is waited for
                lines.wait_for(next(chunks))
                time.sleep(0.5)
            return X[indices], Y[indices]

    def preprocess(x, y, seed):
        if slow == "training":
            tf.py_function(lambda: time.sleep(0.1), [], [])
        return x, y

    changes = {"train": Source(), "validation": None, "preprocess": preprocess}
    settings = {"epochs": 4, "log_steps": 5, "checkpoint_steps": 100, "jit_compile": "false"}
    logger = logging.getLogger("absl")
    with caplog.at_level(logging.INFO, logger="absl"):
        logger.addHandler(lines)
        try:
            train(tmp_path / "run", changes, **settings)
        finally:
            logger.removeHandler(lines)
    told = ["waiting for input" in line for line in lines.texts]
    assert told[1:] == [slow == "input"] * 3  # the first tells of the compilation


MADE_BEFORE = model()


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"model": lambda: None}, {}, "Task.model gave a NoneType; it must give a keras.Model"),
        (
            {"model": lambda: MADE_BEFORE},
            {"strategy": "mirrored", "devices": 2},
            "was made before Task.model was called, outside the strategy's scope",
        ),
        (
            {"model": lambda: keras.Sequential([keras.Input((6,)), keras.layers.Softmax()])},
            {},
            "has no weights to train",
        ),
        ({"optimizer": lambda: "sgd"}, {}, "Task.optimizer gave a str"),
        (
            {"test": dist_train.Arrays(X[:, :5], Y)},
            {},
            r"Task.test has examples \(\[5\], \[\]\) where train has \(\[6\], \[\]\): .* value 6",
        ),
        ({"test": dist_train.Arrays(X, Y + 1)}, {}, "a test label is 2, and the model has 2"),
    ],
)
def test_what_cannot_train_or_be_evaluated_is_named_before_the_first_step(
    workdir, changes, settings, message
):
    with pytest.raises(dist_train.UsageError, match=message):
        train(workdir, changes, **settings)
    assert not (Path(workdir) / "metrics.jsonl").exists()


def test_an_operation_that_fails_is_one_line_of_tensorflows_message(workdir):
    def checked(x, y, seed):
        with tf.control_dependencies([tf.debugging.assert_less(y, 1, "a label of mine")]):
            return x, tf.identity(y)

    with pytest.raises(dist_train.RunError, match=r"^steps 1 to \d+: assertion failed: .*of mine"):
        train(workdir, {"preprocess": checked}, jit_compile="false")


def test_a_loss_of_the_wrong_shape_is_explained(workdir):
    def loss(y, outputs):
        return tf.reduce_mean(outputs)

    with pytest.raises(dist_train.UsageError, match="one value per example"):
        train(workdir, {"loss": loss})


def test_the_steps_asked_for_are_profiled(workdir):
    train(workdir, profile_steps="3,5")
    assert list((Path(workdir) / "tensorboard").glob("plugins/profile/*/*.xplane.pb"))


def test_a_bar_shows_the_steps_where_it_is_asked_for(workdir, capfd):
    train(workdir, progress="true")
    assert "/10 [" in capfd.readouterr().err
