"""Losses and weights that are not finite: --on_nan."""

import dataclasses
import json
import logging

import keras
import numpy as np
import pytest
from bad_run import (
    X,
    Y,
    assert_weights,
    bad_loss,
    by_hand,
    each_strategy,
    inf_gradient,
    rows,
    task,
    train,
)

import dist_train
from dist_train.rows import read_rows

# Example 33 is in the third batch of each epoch: steps 3, 8 and 13.


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
