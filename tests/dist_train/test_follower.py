"""Following another process's checkpoints."""

import pytest
import small_run

from dist_train.errors import UsageError
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
    checkpoints = _Looks(looks)
    results, step = follow(
        checkpoints,
        workdir,
        StopRequest(30.0),
        is_over=lambda step: step == 40,
        timeout_s=30.0,
        validate=lambda: {"loss": 1.0},
        row=lambda step: {"step": step, "epoch": 1},
        check=lambda: None,
    )
    assert step == 40
    assert results == {"validation": {"loss": 1.0}}
    assert [row["step"] for row in read_rows(workdir.followed)] == [20, 40]


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
