"""One trajectory: the loop written out by hand, and every strategy, give the same numbers."""

import itertools
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import dist_train
from dist_train.mnist import files, mlp
from dist_train.rows import read_rows
from dist_train.schedule import Schedule

EXAMPLES, VALIDATION, EPOCHS = 1000, 203, 2
# Wide enough for another order of float32 additions over 40 steps at a large learning rate, and a
# thousand times too narrow for a wrong factor.
LOSS = {"rtol": 2e-4, "atol": 2e-5}
WEIGHTS = {"rtol": 1e-3, "atol": 2e-4}
NORM = {"rtol": 1e-3}


def small_mnist():
    (x, y), _ = files.read(None)
    return (x[:EXAMPLES], y[:EXAMPLES]), (
        x[EXAMPLES : EXAMPLES + VALIDATION],
        y[EXAMPLES : EXAMPLES + VALIDATION],
    )


def task() -> dist_train.Task:
    train, held_out = small_mnist()
    return dist_train.Task(
        model=mlp,
        train=dist_train.Arrays(*train),
        validation=dist_train.Arrays(*held_out),
        test=dist_train.Arrays(*held_out),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics={"accuracy": keras.metrics.sparse_categorical_accuracy},
        preprocess=lambda x, y, seed: (tf.cast(x, tf.float32) / 255.0, y),
    )


def run(workdir, **settings):
    """(logged batch losses, final weights, result) of a run that logs every step."""
    config = dist_train.Config(
        **{"epochs": EPOCHS, "log_steps": 1, "workdir": str(workdir), **settings}
    )
    result = dist_train.train(task, config)
    rows = read_rows(config_path(workdir))
    losses = [row["batch_loss"] for row in rows if row["kind"] == "train"]
    return losses, result.model.get_weights(), result


def logged_norms(workdir):
    rows = read_rows(config_path(workdir))
    return [row["gradient_norm"] for row in rows if row["kind"] == "train"]


def config_path(workdir):
    return Path(workdir) / "metrics.jsonl"


def by_hand(optimizer, batch_size, clip_norm=None, seed=0):
    """The guide's loop: eager, a GradientTape per batch, the mean over the examples there are."""
    (x, y), (x_held, y_held) = small_mnist()
    schedule = Schedule(
        examples=EXAMPLES, batch_size=batch_size, seed=seed, shuffle=True, chunk_steps=10_000
    )
    keras.utils.set_random_seed(seed)
    model = mlp()
    losses, norms = [], []
    for epoch in range(EPOCHS):
        ids, _ = schedule.share(tf.constant(epoch, tf.int64), tf.constant(0, tf.int64), 1)
        for row in ids.numpy()[: schedule.steps_per_epoch]:
            batch = row[row >= 0]
            with tf.GradientTape() as tape:
                logits = model(x[batch].astype(np.float32) / 255.0, training=True)
                each = tf.nn.sparse_softmax_cross_entropy_with_logits(
                    y[batch].astype(np.int32), logits
                )
                loss = tf.reduce_mean(each)
            gradients = tape.gradient(loss, model.trainable_variables)
            norms.append(float(tf.linalg.global_norm(gradients)))
            if clip_norm is not None:
                gradients, _ = tf.clip_by_global_norm(gradients, clip_norm)
            optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
            losses.append(float(loss))
    logits = model(x_held.astype(np.float32) / 255.0)
    held = tf.nn.sparse_softmax_cross_entropy_with_logits(y_held.astype(np.int32), logits)
    accuracy = np.mean(np.argmax(logits, axis=1) == y_held)
    return losses, model.get_weights(), float(tf.reduce_mean(held)), float(accuracy), norms


CASES = {
    "sgd": ({"optimizer": "sgd", "learning_rate": 0.1}, 64, None),
    "sgd-clipped": ({"optimizer": "sgd", "learning_rate": 0.5, "clip_norm": 0.3}, 50, 0.3),
    "adam": ({"optimizer": "adam", "learning_rate": 1e-3}, 100, None),
    "adam-clipped": ({"optimizer": "adam", "learning_rate": 1e-3, "clip_norm": 0.5}, 64, 0.5),
}
OPTIMIZERS = {"sgd": keras.optimizers.SGD, "adam": keras.optimizers.Adam}


@pytest.fixture(scope="module")
def reference():
    """by_hand of each case, worked out once."""
    cache = {}

    def of(case):
        if case not in cache:
            settings, batch_size, clip_norm = CASES[case]
            optimizer = OPTIMIZERS[settings["optimizer"]](settings["learning_rate"])
            cache[case] = by_hand(optimizer, batch_size, clip_norm)
        return cache[case]

    return of


STRATEGIES = {
    "default": {"strategy": "default"},
    "mirrored-2": {"strategy": "mirrored", "devices": 2},
    "mirrored-3": {"strategy": "mirrored", "devices": 3},
    "mirrored-4": {"strategy": "mirrored", "devices": 4},
}


@pytest.mark.parametrize(
    ("strategy", "mode", "case"),
    [
        pytest.param(
            *combination,
            # One of each kind in the quick suite, all of them in the whole one.
            marks=[] if combination[2] in ("sgd", "adam-clipped") else pytest.mark.slow,
        )
        for combination in itertools.product(STRATEGIES, ("resident", "stream"), CASES)
    ],
)
def test_every_strategy_follows_the_loop_written_by_hand(reference, tmp_path, strategy, mode, case):
    settings, batch_size, _ = CASES[case]
    losses, weights, held_loss, held_accuracy, norms = reference(case)

    got_losses, got_weights, result = run(
        tmp_path, batch_size=batch_size, input=mode, **settings, **STRATEGIES[strategy]
    )

    np.testing.assert_allclose(got_losses, losses, **LOSS)
    np.testing.assert_allclose(logged_norms(tmp_path), norms, **NORM)
    for got, expected in zip(got_weights, weights, strict=True):
        np.testing.assert_allclose(got, expected, **WEIGHTS)
    # 203 divides by no number of replicas here: each example counts once.
    assert result.metrics["validation"]["loss"] == pytest.approx(held_loss, rel=1e-3)
    assert result.metrics["validation"]["accuracy"] == pytest.approx(
        held_accuracy, abs=1.01 / VALIDATION
    )
    assert result.metrics["test"]["accuracy"] == result.metrics["validation"]["accuracy"]
    assert result.step == EPOCHS * -(-EXAMPLES // batch_size)


@pytest.mark.parametrize("strategy", ["default", "mirrored-3"])
@pytest.mark.parametrize(
    "settings",
    [
        {"steps_per_loop": 7},
        {"gradient_accumulation": 5},
        {"jit_compile": "false"},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_what_only_changes_the_work_does_not_change_the_numbers(
    reference, tmp_path, strategy, settings
):
    base, batch_size, _ = CASES["sgd"]
    losses, weights, _, _, norms = reference("sgd")
    got_losses, got_weights, _ = run(
        tmp_path, batch_size=batch_size, **base, **settings, **STRATEGIES[strategy]
    )
    np.testing.assert_allclose(got_losses, losses, **LOSS)
    np.testing.assert_allclose(logged_norms(tmp_path), norms, **NORM)
    for got, expected in zip(got_weights, weights, strict=True):
        np.testing.assert_allclose(got, expected, **WEIGHTS)


def test_the_tolerance_would_notice_a_mean_over_the_padded_batch(reference):
    """The last batch of 40 in a padded 64 would be off by 40/64: a check of the check."""
    losses, *_ = reference("sgd")
    wrong = np.array(losses)
    wrong[15] *= 40 / 64
    assert not np.allclose(wrong, losses, **LOSS)


def test_logged_means_cover_every_example_once(tmp_path, reference):
    base, batch_size, _ = CASES["sgd"]
    losses, _, _ = run(tmp_path / "each", batch_size=batch_size, **base)
    run(tmp_path / "some", batch_size=batch_size, log_steps=6, **base)
    rows = [r for r in read_rows(tmp_path / "some" / "metrics.jsonl") if r["kind"] == "train"]
    assert [row["step"] for row in rows] == [6, 12, 18, 24, 30, 32]
    counts = [64] * 15 + [40] + [64] * 15 + [40]
    begin = 0
    for row in rows:
        part = slice(begin, row["step"])
        mean = np.average(losses[part], weights=counts[part])
        assert row["loss"] == pytest.approx(mean, rel=1e-4)
        assert row["examples"] == sum(counts[: row["step"]])
        begin = row["step"]
        # Of the last of the many steps that a call made.
        assert row["gradient_norm"] == pytest.approx(
            reference("sgd")[-1][row["step"] - 1], rel=NORM["rtol"]
        )
