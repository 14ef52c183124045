"""The state of a run: the best of it, remote workdirs, and losses that are not finite."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import dist_train
from dist_train.rows import read_rows

RNG = np.random.default_rng(0)
X = RNG.normal(size=(80, 6)).astype(np.float32)
Y = (X.sum(axis=1) > 0).astype(np.int32)
STRATEGIES = {
    "default": {},
    "mirrored": {"strategy": "mirrored", "devices": 2},
    "plain": {"jit_compile": "false"},
}
each_strategy = pytest.mark.parametrize("settings", STRATEGIES.values(), ids=STRATEGIES)


def model():
    return keras.Sequential([keras.Input((6,)), keras.layers.Dense(2)])


def bad_loss(y, outputs):
    """Not a number for the batch that has a label of 2."""
    each = keras.losses.sparse_categorical_crossentropy(tf.minimum(y, 1), outputs, from_logits=True)
    return tf.where(y == 2, np.nan, each)


def inf_gradient(y, outputs):
    """A finite loss whose gradient is not, for a label of 2: that of a root at zero."""
    each = keras.losses.sparse_categorical_crossentropy(tf.minimum(y, 1), outputs, from_logits=True)
    here = tf.cast(y == 2, tf.float32)
    root = tf.sqrt(tf.reduce_sum(outputs**2, axis=-1) * (1.0 - here))
    return each + here * root


def task(bad=(), loss=bad_loss, build=model):
    y = Y.copy()
    y[list(bad)] = 2
    return dist_train.Task(
        model=build,
        train=dist_train.Arrays(X, y),
        validation=dist_train.Arrays(X[:40], Y[:40]),
        loss=loss,
        metrics={"accuracy": keras.metrics.sparse_categorical_accuracy},
    )


def train(workdir, what=None, **settings):
    values = {"batch_size": 16, "epochs": 3, "learning_rate": 0.5, "log_steps": 1, "shuffle": False}
    config = dist_train.Config(workdir=str(workdir), **(values | settings))
    return dist_train.train(what or task(), config)


def rows(workdir, kind="train"):
    found = read_rows(Path(workdir) / "metrics.jsonl")
    return {row["step"]: row["loss"] for row in found if row["kind"] == kind}


def by_hand(steps, weights=None):
    """Weights after plain SGD on the batches of these steps (from 1; 5 make an epoch)."""
    keras.utils.set_random_seed(0)
    built = model()
    if weights is not None:
        built.set_weights(weights)
    for step in steps:
        at = (step - 1) % 5 * 16
        with tf.GradientTape() as tape:
            each = keras.losses.sparse_categorical_crossentropy(
                Y[at : at + 16], built(X[at : at + 16]), from_logits=True
            )
            loss = tf.reduce_mean(each)
        for variable, gradient in zip(
            built.trainable_variables, tape.gradient(loss, built.trainable_weights), strict=True
        ):
            variable.assign(variable - 0.5 * gradient)
    return built.get_weights()


def assert_weights(result, expected):
    for mine, theirs in zip(result.model.get_weights(), expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)


# Losses that are not finite. Example 33 is in the third batch of each epoch: steps 3, 8 and 13.


@each_strategy
@pytest.mark.parametrize("loss", [bad_loss, inf_gradient])
def test_skip_leaves_out_the_steps_that_are_not_finite_and_no_others(tmp_path, settings, loss):
    result = train(tmp_path, task([33], loss), on_nan="skip", **settings)
    assert_weights(result, by_hand([1, 2, 4, 5, 6, 7, 9, 10, 11, 12, 14, 15]))
    losses = rows(tmp_path)
    assert sorted(losses) == list(range(1, 16))
    assert [step for step, value in losses.items() if value is None] == [3, 8, 13]


def test_what_is_left_out_is_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        train(tmp_path, task([33]), on_nan="skip", epochs=1)
    assert "step 3 is left out: its loss or gradient is not finite" in caplog.text


def test_a_mean_over_several_steps_is_over_those_that_were_finite(tmp_path):
    one = train(tmp_path / "one", task([33]), on_nan="skip", epochs=1, log_steps=1)
    assert one.step == 5
    train(tmp_path / "five", task([33]), on_nan="skip", epochs=1, log_steps=5)
    each = [value for value in rows(tmp_path / "one").values() if value is not None]
    assert rows(tmp_path / "five")[5] == pytest.approx(np.mean(each), rel=1e-5)


@each_strategy
def test_skip_keeps_batch_statistics_clean(tmp_path, settings):
    def build():
        several = settings.get("devices", 1) > 1
        normalize = keras.layers.BatchNormalization(synchronized=several, momentum=0.5)
        return keras.Sequential([keras.Input((6,)), normalize, keras.layers.Dense(2)])

    x = X.copy()
    x[33] = np.inf
    poisoned = dist_train.Task(
        model=build, train=dist_train.Arrays(x, Y), loss=bad_loss, metrics={}
    )
    result = train(tmp_path, poisoned, on_nan="skip", epochs=2, **settings)
    assert all(np.all(np.isfinite(w)) for w in result.model.get_weights())
    mean = np.zeros(6, np.float32)
    for step in (1, 2, 4, 5) * 2:
        mean = 0.5 * mean + 0.5 * X[(step - 1) * 16 : step * 16].mean(axis=0)
    np.testing.assert_allclose(
        result.model.layers[0].moving_mean.numpy(), mean, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("log_steps", [1, 5, 500])
def test_skip_goes_on_while_some_steps_are_finite(tmp_path, log_steps):
    bad = task([79])  # the last of the 5 steps of an epoch
    assert train(tmp_path, bad, on_nan="skip", epochs=102, log_steps=log_steps).step == 510


def test_skip_gives_up_when_nothing_is_finite_any_more(tmp_path):
    with pytest.raises(dist_train.RunError, match="since step 0; what was saved before is"):
        train(tmp_path, task(range(80)), on_nan="skip", epochs=50)


@each_strategy
def test_restore_goes_back_to_the_checkpoint_and_on_behind_the_step(tmp_path, settings):
    result = train(tmp_path, task([33]), on_nan="restore", epochs=2, checkpoint_steps=2, **settings)
    # 3 fails: back to 2, on with 4; 8 fails: back to 6, on with 9.
    assert_weights(result, by_hand([1, 2, 4, 5, 6, 9, 10]))
    assert result.step == 10


@each_strategy
def test_what_a_rewind_has_undone_is_in_no_row(tmp_path, settings):
    train(
        tmp_path, task([33]), on_nan="restore", epochs=2, checkpoint_steps=2, log_steps=4,
        **settings,
    )  # fmt: skip
    found = [row for row in read_rows(tmp_path / "metrics.jsonl") if row["kind"] == "train"]
    assert [row["step"] for row in found] == [4, 10]  # the loss of step 8 is not finite
    assert all(row["loss"] > 0.0 and row["examples_per_second"] > 0.0 for row in found)


def test_restore_before_the_first_checkpoint_starts_again_from_the_initial_weights(tmp_path):
    result = train(tmp_path, task([33]), on_nan="restore", epochs=1)
    assert_weights(result, by_hand([4, 5]))


def test_restore_ends_the_same_when_the_run_was_stopped_in_between(tmp_path, stops_at):
    settings = {"on_nan": "restore", "epochs": 2, "checkpoint_steps": 5, "steps_per_loop": 1}
    bad = task([49])  # steps 4 and 9
    stopping = dataclasses.replace(bad, preprocess=stops_at(7))
    with pytest.raises(dist_train.Stopped, match="after step 7,"):
        train(tmp_path, stopping, jit_compile="false", **settings)
    assert (tmp_path / "checkpoints" / "step-00000007").exists()
    # Back to 0 at step 4; back to 5, not to 7, at step 9.
    assert_weights(train(tmp_path, bad, **settings), by_hand([5, 10]))


@each_strategy
def test_restore_goes_back_for_weights_that_are_not_finite_after_the_last_step(tmp_path, settings):
    result = train(
        tmp_path, task([79], inf_gradient), on_nan="restore", epochs=1, checkpoint_steps=2,
        **settings,
    )  # fmt: skip
    # The loss of step 5, whose gradient is not finite, is.
    assert_weights(result, by_hand([1, 2, 3, 4]))
    saved = keras.saving.load_model(tmp_path / "model.keras").get_weights()
    assert all(np.all(np.isfinite(weight)) for weight in saved)
    assert (tmp_path / "checkpoints" / "step-00000005").exists()
    assert np.isfinite(result.metrics["validation"]["loss"])
    assert 5 not in rows(tmp_path)


def test_restore_goes_back_before_early_stopping_could_end_the_run(tmp_path):
    result = train(
        tmp_path, task([79], inf_gradient), on_nan="restore", early_stopping=1, epochs=2,
        checkpoint_steps=2,
    )  # fmt: skip
    assert all(np.isfinite(loss) for loss in rows(tmp_path, "validation").values())
    assert_weights(result, by_hand([1, 2, 3, 4, 6, 7, 8]))


def test_restore_gives_up_when_it_does_not_help(tmp_path):
    with pytest.raises(dist_train.RunError, match=r"went back to its last checkpoint 3 times"):
        train(tmp_path, task(range(16, 80)), on_nan="restore", epochs=2)


def test_the_policy_may_change_on_a_resume(tmp_path):
    with pytest.raises(dist_train.RunError, match=r"loss of step 3 is nan.*--on_nan=skip"):
        train(tmp_path, task([33]), epochs=1, checkpoint_steps=1)
    result = train(tmp_path, task([33]), epochs=1, checkpoint_steps=1, on_nan="skip")
    assert_weights(result, by_hand([1, 2, 4, 5]))


def test_rows_are_json_for_everybody_also_where_a_loss_is_not_finite(tmp_path):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    train(tmp_path, task([33]), on_nan="skip", epochs=1)
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


# The best by validation.


def test_the_best_checkpoint_is_that_of_the_best_validation(tmp_path):
    train(tmp_path, epochs=8, learning_rate=60.0, keep_checkpoints=1)
    validated = rows(tmp_path, "validation")
    best = min(validated, key=validated.get)
    assert best < 40, "the last is the best: the case shows nothing"
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [f"best-{best:08d}", "step-00000040"]
    evaluated = train(tmp_path, epochs=8, learning_rate=60.0, mode="evaluate", checkpoint="best")
    assert evaluated.step == best
    assert evaluated.metrics["validation"]["loss"] == pytest.approx(validated[best], rel=1e-5)


def test_the_best_of_a_run_in_two_parts_is_that_of_the_whole(tmp_path):
    settings = {"learning_rate": 60.0, "keep_checkpoints": 1}
    train(tmp_path / "whole", epochs=8, **settings)
    for epochs in (3, 5, 8):
        train(tmp_path / "parts", epochs=epochs, **settings)
    names = [
        [path.name for path in (tmp_path / part / "checkpoints").glob("best-*")]
        for part in ("whole", "parts")
    ]
    assert len(names[0]) == 1
    assert names[0] == names[1]


def test_the_best_of_a_run_that_was_killed_before_it_was_copied_is_made_again(tmp_path):
    # So many that early stopping takes the best, and ends nothing.
    settings = {"learning_rate": 60.0, "keep_checkpoints": 1, "early_stopping": 8}
    whole = train(tmp_path / "whole", epochs=8, **settings)
    validated = rows(tmp_path / "whole", "validation")
    best = min(validated, key=validated.get)
    assert best < 40, "the last is the best: the case shows nothing"
    train(tmp_path / "parts", epochs=best // 5, **settings)
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / f"best-{best:08d}")
    resumed = train(tmp_path / "parts", epochs=8, **settings)
    assert_weights(resumed, whole.model.get_weights())


def test_with_early_stopping_no_older_weights_are_taken_for_the_best(tmp_path):
    settings = {"learning_rate": 60.0, "keep_checkpoints": 1, "early_stopping": 8, "epochs": 8}
    train(tmp_path, **settings)
    (best,) = (tmp_path / "checkpoints").glob("best-*")
    best.rename(best.with_name("best-00000001"))
    with pytest.raises(dist_train.RunError, match=f"{best.name}, whose weights early stopping"):
        train(tmp_path, **settings)


def test_another_best_metric_or_mode_begins_the_best_anew(tmp_path, caplog):
    settings = {"learning_rate": 60.0, "keep_checkpoints": 1}
    # No accuracy is greater.
    above_one = task(loss=lambda y, outputs: 2.0 + bad_loss(y, outputs))

    def resume(epochs, **changed):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            train(tmp_path, above_one, epochs=epochs, **settings, **changed)
        return "begin anew" in caplog.text

    def best():
        return [path.name for path in (tmp_path / "checkpoints").glob("best-*")]

    assert not resume(3)
    of_loss = best()
    assert not resume(3, best_metric="accuracy", mode="evaluate", checkpoint="best")
    # With no step left, the checkpoint alone can know of it the next time.
    assert resume(3, best_metric="accuracy")
    assert "best_metric=accuracy (was loss): the best validation" in caplog.text
    assert best() == of_loss
    assert not resume(6, best_metric="accuracy")
    found = read_rows(tmp_path / "metrics.jsonl")
    accuracies = {r["step"]: r["accuracy"] for r in found if r["kind"] == "validation"}
    since = {step: value for step, value in accuracies.items() if step > 15}
    assert best() == [f"best-{max(since, key=since.get):08d}"]
    assert resume(8, best_metric="accuracy", best_mode="min")
    assert best()[0] > "best-00000030"


def test_a_metric_is_maximized_and_loss_minimized_unless_told_otherwise(tmp_path):
    validated = {}
    for name, mode in (
        ("loss", "auto"),
        ("loss", "max"),
        ("accuracy", "auto"),
        ("accuracy", "min"),
    ):
        folder = tmp_path / f"{name}-{mode}"
        train(folder, epochs=8, learning_rate=60.0, best_metric=name, best_mode=mode)
        found = read_rows(folder / "metrics.jsonl")
        values = [(r[name], r["step"]) for r in found if r["kind"] == "validation"]
        extreme = min if (name, mode) in (("loss", "auto"), ("accuracy", "min")) else max
        value = extreme(value for value, _ in values)
        first = next(step for v, step in values if v == value)
        assert [p.name for p in (folder / "checkpoints").glob("best-*")] == [f"best-{first:08d}"]
        validated[name, mode] = first
    assert len(set(validated.values())) > 1


def test_a_best_metric_that_the_task_does_not_have_is_refused(tmp_path):
    with pytest.raises(dist_train.UsageError, match=r"best_metric='acc' is not .*: loss, accuracy"):
        train(tmp_path, best_metric="acc")


# Evaluating any checkpoint, and remote workdirs.


def test_any_checkpoint_is_evaluated_by_its_step_or_folder(tmp_path):
    train(tmp_path / "run")
    validated = rows(tmp_path / "run", "validation")
    for name in ("5", str(tmp_path / "run" / "checkpoints" / "step-00000005")):
        result = train(tmp_path / "run", mode="evaluate", checkpoint=name)
        assert result.step == 5
        assert result.metrics["validation"]["loss"] == pytest.approx(validated[5], rel=1e-5)


def test_a_checkpoint_that_is_not_there_is_named(tmp_path):
    train(tmp_path)
    with pytest.raises(dist_train.UsageError, match=r"checkpoint='7' .*\(5, 10, 15, best\)"):
        train(tmp_path, mode="evaluate", checkpoint="7")


def test_a_checkpoint_is_chosen_for_an_evaluation_only():
    with pytest.raises(dist_train.UsageError, match="is for --mode=evaluate"):
        dist_train.Config(checkpoint="best")


def test_a_remote_workdir_is_resumed_and_holds_everything(tmp_path):
    remote = f"file://{tmp_path}/run"  # TensorFlow's ram:// appends where it should overwrite
    train(remote, epochs=1)
    result = train(remote)
    local = train(tmp_path / "local")
    assert_weights(result, local.model.get_weights())
    assert result.workdir == remote
    names = {name.rstrip("/") for name in tf.io.gfile.listdir(remote)}
    assert {
        "checkpoints", "config.json", "curves.png", "metrics.jsonl", "model.keras", "saved_model",
        "tensorboard",
    } <= names  # fmt: skip
    with tf.io.gfile.GFile(f"{remote}/metrics.jsonl") as file:
        found = [json.loads(line) for line in file.read().splitlines()]
    assert [row["step"] for row in found if row["kind"] == "train"] == list(range(1, 16))
    evaluated = train(remote, mode="evaluate", checkpoint="best")
    assert evaluated.metrics["validation"]["loss"] == min(
        row["loss"] for row in found if row["kind"] == "validation"
    )
    with pytest.raises(dist_train.UsageError, match=r"batch_size=8 \(was 16\)"):
        train(remote, batch_size=8)
    with pytest.raises(dist_train.UsageError, match=r"does not exist"):
        train(f"{remote}-none", mode="evaluate")


def test_a_remote_workdir_of_no_known_kind_is_refused(tmp_path):
    with pytest.raises(dist_train.UsageError, match=r"workdir=nosuch://a/b cannot be used"):
        train("nosuch://a/b")


def test_a_workdir_that_is_removed_meanwhile_ends_the_run_and_is_not_made_again(tmp_path):
    folder = tmp_path / "run"

    def remove(x, y, seed):
        if seed is not None:
            tf.py_function(lambda: shutil.rmtree(folder, ignore_errors=True), [], [])
        return x, y

    removing = dist_train.Task(
        model=model, train=dist_train.Arrays(X, Y), loss=bad_loss, preprocess=remove
    )
    with pytest.raises(dist_train.RunError, match=r"was removed while the run went on"):
        train(folder, removing, jit_compile="false", log_steps=100)
    assert not folder.exists()
