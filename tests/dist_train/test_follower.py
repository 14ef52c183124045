"""Following another process's checkpoints."""

import json
from pathlib import Path

import pytest
import small_run
import tensorflow as tf

from dist_train import follower
from dist_train.errors import RunError, UsageError
from dist_train.follower import follow
from dist_train.rows import read_rows
from dist_train.stopping import StopRequest
from dist_train.workdir import Workdir


class _Looks:
    """Checkpoints of a run that writes on: (the newest that is listed, what is then restored)."""

    def __init__(self, looks):
        self._looks = iter(looks)

    def steps(self):
        listed, self._restored = next(self._looks)
        return [listed]

    def restore(self):
        return self._restored


@pytest.mark.parametrize(
    "looks",
    [
        pytest.param([(10, 20), (20, 20), (20, 20), (30, 40)], id="one comes meanwhile"),
        pytest.param([(20, 20), (30, 20), (30, 20), (40, 40)], id="one is damaged"),
    ],
)
def test_each_checkpoint_counts_once(tmp_path, looks):
    workdir = Workdir(tmp_path / "run")
    assert _followed(workdir, looks) == ({"validation": {"loss": 1.0}}, 40)
    assert [row["step"] for row in read_rows(workdir.followed)] == [20, 40]


@pytest.mark.parametrize(
    ("looks", "kept"),
    [
        pytest.param([(40, 40)], [10, 20], id="the newest is evaluated again"),
        pytest.param([(20, 20), (40, 40)], [10], id="an earlier one"),
        pytest.param([(50, 50), (60, 60)], [10, 20, 40], id="later ones"),
        pytest.param([(5, 5)], [], id="the run was begun anew"),
    ],
)
def test_the_rows_of_an_earlier_start_stay_up_to_the_first_checkpoint_of_this(
    tmp_path, looks, kept
):
    workdir = Workdir(tmp_path / "run")
    _followed(workdir, [(10, 10), (20, 20), (40, 40)], loss=1.0)
    _followed(workdir, looks, loss=2.0)
    found = [(row["step"], row["loss"]) for row in read_rows(workdir.followed)]
    assert found == [(step, 1.0) for step in kept] + [(step, 2.0) for step, _ in looks]


def _followed(workdir, looks, loss=1.0):
    last = looks[-1][1]
    return follow(
        _Looks(looks),
        workdir,
        StopRequest(30.0),
        is_over=lambda step: step == last,
        timeout_s=30.0,
        validate=lambda: {"loss": loss},
        row=lambda step: {"step": step, "epoch": 1},
        check=lambda: None,
    )


def test_a_run_that_has_other_settings_is_not_followed(workdir, monkeypatch):
    """It may have begun after the follower, which found nothing to compare with before."""
    small_run.train(workdir, seed=3)
    monkeypatch.setattr(Workdir, "check_resumable", _later(Workdir.check_resumable))
    with pytest.raises(UsageError, match=r"seed=0 \(was 3\)"):
        small_run.train(workdir, mode="follow")


def _later(check):
    """As where there is nothing yet the first time."""
    calls = []

    def checked(self, trajectory):
        calls.append(trajectory)
        if len(calls) > 1:
            check(self, trajectory)

    return checked


# Of a run of 5 steps an epoch.


@pytest.fixture
def remote(workdir):
    """What only tf.io.gfile reaches, as the user calls it; it is in the folder `workdir`."""
    return f"file://{workdir}"


def _steps(workdir):
    return [row["step"] for row in read_rows(Path(workdir) / "follow.jsonl")]


def _meanwhile(monkeypatch, *acts):
    """While the follower waits, one after the other."""
    left = iter(acts)
    monkeypatch.setattr(follower.time, "sleep", lambda seconds: next(left, lambda: None)())


def test_a_follower_may_begin_before_a_remote_run(remote, workdir, monkeypatch):
    _meanwhile(monkeypatch, lambda: small_run.train(remote))
    assert small_run.train(remote, mode="follow").step == 10
    assert _steps(workdir) == [10]


def test_a_follower_that_begins_first_waits_within_a_bound(remote):
    with pytest.raises(RunError, match=r"no checkpoint after step -1 .* for 0\.5 s"):
        small_run.train(remote, mode="follow", stall_timeout_s=0.5)


def test_a_remote_run_that_begins_later_with_other_settings_is_not_followed(remote, monkeypatch):
    _meanwhile(monkeypatch, lambda: small_run.train(remote, seed=3))
    with pytest.raises(UsageError, match=r"seed=0 \(was 3\)"):
        small_run.train(remote, mode="follow")


def test_a_follower_of_a_remote_run_that_starts_again_keeps_the_rows_of_before(remote, workdir):
    for epochs in (1, 2):
        small_run.train(remote, epochs=epochs)
        small_run.train(remote, epochs=epochs, mode="follow")
    assert _steps(workdir) == [5, 10]


def test_a_resumed_chief_leaves_the_rows_of_a_follower_alone(remote, workdir):
    small_run.train(remote, epochs=1)
    small_run.train(remote, epochs=1, mode="follow")
    newer = '{"kind": "validation", "step": 7, "loss": 0.5}\n'
    rows = Path(workdir) / "follow.jsonl"
    text = rows.read_text() + newer

    def write(x, y, seed):
        if seed is not None:
            tf.py_function(lambda: rows.write_text(text) and None, [], [])
        return x, y

    small_run.train(remote, {"preprocess": write}, jit_compile="false")
    assert rows.read_text() == text


def test_the_run_that_is_followed_decides_where_it_ends(workdir, caplog):
    small_run.train(workdir, epochs=2)
    assert small_run.train(workdir, mode="follow", epochs=4, stall_timeout_s=5.0).step == 10
    assert _steps(workdir) == [10]
    assert "its run ends after step 10 by its config.json" in caplog.text


def test_a_run_of_more_epochs_than_the_follower_has_is_followed_to_its_end(
    remote, workdir, monkeypatch
):
    small_run.train(remote, epochs=1)
    config = Path(workdir) / "config.json"
    config.write_text(config.read_text().replace('"epochs": 1', '"epochs": 3'))  # it is killed
    _meanwhile(monkeypatch, lambda: small_run.train(remote, epochs=4))  # and resumed
    assert small_run.train(remote, mode="follow", epochs=1).step == 20
    assert _steps(workdir) == [5, 20]


def test_a_run_that_is_resumed_for_fewer_epochs_is_over(workdir, monkeypatch):
    small_run.train(workdir, epochs=2)
    config = Path(workdir) / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"epochs": 2', '"epochs": 3'))
    _meanwhile(monkeypatch, lambda: config.write_text(text))
    assert small_run.train(workdir, mode="follow", epochs=3, stall_timeout_s=5.0).step == 10


def test_the_run_that_is_followed_decides_whether_it_stops_early(workdir):
    settings = {"learning_rate": 0.0, "epochs": 5}
    small_run.train(workdir, early_stopping=1, **settings)
    assert small_run.train(workdir, mode="follow", stall_timeout_s=5.0, **settings).step == 10


def test_the_evaluator_of_a_launcher_has_the_settings_of_the_run(workdir, monkeypatch):
    """What config.json has may be of the start before, as they start together."""
    small_run.train(workdir, epochs=1)
    cluster = {"cluster": {"worker": ["n1:1"]}, "task": {"type": "evaluator", "index": 0}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(cluster))
    with pytest.raises(RunError, match="no checkpoint after step 5"):
        small_run.train(workdir, epochs=2, stall_timeout_s=1.0)
