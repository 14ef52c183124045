"""The state of a run: the best of it, any checkpoint, remote workdirs."""

import json
import logging
import shutil

import pytest
import tensorflow as tf
from bad_run import X, Y, assert_weights, bad_loss, model, rows, task, train

import dist_train
from dist_train.rows import read_rows


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
