"""Lines of the log: a call of the loop tells of many as calls of one step each would."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import dist_train
from dist_train import replicas
from dist_train.build import Parts
from dist_train.log import RunLog
from dist_train.pace import Pace
from dist_train.rows import read_rows
from dist_train.step import TrainLoop
from dist_train.workers import Workers

RNG = np.random.default_rng(0)
X = RNG.normal(size=(100, 6)).astype(np.float32)
Y = (X.sum(axis=1) > 0).astype(np.int32)
STRATEGIES = {
    "default": {},
    "mirrored": {"strategy": "mirrored", "devices": 2},
    "plain": {"jit_compile": "false"},
}
each_strategy = pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)


def model():
    return keras.Sequential([keras.Input((6,)), keras.layers.Dense(2)])


def task(x=X, y=Y):
    return dist_train.Task(
        model=model,
        train=dist_train.Arrays(x, y),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics={"accuracy": keras.metrics.sparse_categorical_accuracy},
    )


@pytest.fixture
def told(monkeypatch):
    """[[steps of a line, …], …]: of each call of the loop since the list was cleared."""
    calls, call = [], TrainLoop.__call__

    def listed(*args, **kwargs):
        lines = call(*args, **kwargs)
        calls.append([line.steps for line in lines])
        return lines

    monkeypatch.setattr(TrainLoop, "__call__", listed)
    return calls


class Unhurried(Pace):
    """Calls are as long as they may be, from the first one on."""

    def __init__(self, most):
        super().__init__(most)
        self.wish = self.steps = most

    def done(self, steps, *, agreed):
        super().done(steps, agreed=agreed)
        self.wish = self._most


@pytest.fixture(autouse=True)
def _unhurried(monkeypatch):
    monkeypatch.setattr("dist_train.fit.Pace", Unhurried)


@pytest.fixture
def written(monkeypatch):
    """(row, further numbers, ago_s) of each line of training that was written."""
    lines, write = [], RunLog.train

    def listed(log, row, also, *, ago_s, waiting=0.0):
        lines.append((row, also, ago_s))
        write(log, row, also, ago_s=ago_s, waiting=waiting)

    monkeypatch.setattr(RunLog, "train", listed)
    return lines


def train(workdir, what=None, **settings):
    values = {"batch_size": 8, "epochs": 2, "learning_rate": 0.5, "lr_schedule": "cosine"}
    config = dist_train.Config(workdir=str(workdir), **(values | settings))
    return dist_train.train(what or task(), config)


@each_strategy
def test_lines_are_the_same_however_many_steps_a_call_makes(tmp_path, strategy, told, written):
    found = {}
    for steps, calls in ((1, [[1]] * 26), (5, None), (1000, [[3, 3, 3, 3, 1], [2, 3, 3, 3, 2]])):
        told.clear()
        written.clear()
        train(tmp_path / str(steps), log_steps=3, steps_per_loop=steps, **strategy)
        assert told == (calls or told)
        assert sum(map(sum, told)) == 26
        found[steps] = [
            {**row, "learning_rate": also["learning_rate"], "examples_per_second": 0.0}
            for row, also, _ in written
        ]
    assert [row["step"] for row in found[1]] == [3, 6, 9, 12, 15, 18, 21, 24, 26]
    rates = [row["learning_rate"] for row in found[1]]
    np.testing.assert_allclose(
        rates, [0.25 * (1 + np.cos(np.pi * (row["step"] - 1) / 26)) for row in found[1]], rtol=1e-4
    )
    for other in (found[5], found[1000]):
        for row, same in zip(other, found[1], strict=True):
            assert row == pytest.approx(same, rel=1e-5)


def test_lines_of_a_call_share_its_time_by_their_steps(tmp_path, told, written):
    train(tmp_path, log_steps=5, steps_per_loop=1000, epochs=1)
    assert told == [[5, 5, 3]]
    rows, _, ago = zip(*written, strict=True)
    assert ago == pytest.approx([ago[1] * 8 / 3, ago[1], 0.0])
    assert ago[1] > 0.0
    # The last batch has 4 examples of 8.
    rates = [row["examples_per_second"] for row in rows]
    assert rates == pytest.approx([rates[0], rates[0], rates[0] * (20 / 3) / 8])
    times = [row["time"] for row in read_rows(tmp_path / "metrics.jsonl")]
    assert times == sorted(times)


def test_a_call_ends_with_the_last_line_that_it_can_tell_of(tmp_path, told):
    x = np.repeat(X, 25, axis=0)
    train(tmp_path, task(x, x[:, 0] > 0), log_steps=1, steps_per_loop=1000, epochs=1)
    assert told == [[1] * 256, [1] * 57]
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 314))


@each_strategy
@pytest.mark.parametrize(
    ("start", "stop", "to_line", "steps"),
    [
        (0, 10, None, [4, 4, 2]),
        (0, 8, 4, [4, 4]),
        (2, 10, 1, [1, 4, 3]),
        (2, 5, 4, [3]),
        (2, 3, 1, [1]),
    ],
)
def test_a_line_ends_after_its_steps_or_with_the_call(strategy, start, stop, to_line, steps):
    config = dist_train.Config(batch_size=8, log_steps=4, **strategy)
    made = replicas.create(config.strategy, config.devices, None)
    parts = Parts(task(), config, made, Workers(made, None, stall_timeout_s=60.0))
    inputs = parts.inputs["train"]
    lines = parts.train_loop(inputs.data, next(inputs.chunks(0)), start, stop, 7, to_line=to_line)
    assert [line.steps for line in lines] == steps
    assert [line.sums[1] for line in lines] == [8 * n for n in steps]
    assert all(line.last[1] == 8 and line.gradient_norm > 0.0 for line in lines)
    assert all(line.next_steps == 7 and not line.stop for line in lines)


@each_strategy
def test_a_line_may_never_be_due(tmp_path, strategy, told):
    train(tmp_path, log_steps=10**12, steps_per_loop=1000, **strategy)
    assert told == [[13], [13]]


@each_strategy
@pytest.mark.parametrize("bad", [0, 3, 4, 9])
def test_the_lines_before_a_loss_that_is_not_finite_are_told(tmp_path, strategy, bad, told):
    def loss(y, outputs):
        each = keras.losses.sparse_categorical_crossentropy(y % 2, outputs, from_logits=True)
        return tf.where(y > 1, np.nan, each)

    y = Y.copy()
    y[8 * bad] += 2
    what = dist_train.Task(model=model, train=dist_train.Arrays(X, y), loss=loss)
    with pytest.raises(dist_train.RunError, match=f"the loss of step {bad + 1} is nan"):
        train(tmp_path, what, log_steps=4, steps_per_loop=1000, shuffle=False, **strategy)
    assert told == [[4] * (bad // 4) + [bad % 4 + 1]]
    steps = [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")]
    assert steps == [4 * (n + 1) for n in range(bad // 4)]
