"""Following another process's checkpoints."""

from dist_train import metrics
from dist_train.follower import follow
from dist_train.stopping import StopRequest
from dist_train.workdir import Workdir


class _Quick:
    """Checkpoints of a run that writes on: each that is asked for is older than what is read."""

    def __init__(self, looks):
        self._looks = iter(looks)

    def steps(self):
        listed, self._newest = next(self._looks)
        return [listed]

    def restore(self):
        return self._newest


def test_a_checkpoint_that_comes_between_the_look_and_the_read_counts_once(tmp_path):
    workdir = Workdir(tmp_path / "run")
    checkpoints = _Quick([(10, 20), (20, 20), (20, 20), (30, 40)])
    results, step = follow(
        checkpoints,
        workdir,
        StopRequest(30.0),
        is_over=lambda step: step == 40,
        timeout_s=30.0,
        validate=lambda: {"loss": 1.0},
        row=lambda step: {"step": step, "epoch": 1},
    )
    assert step == 40
    assert results == {"validation": {"loss": 1.0}}
    assert [row["step"] for row in metrics.read_rows(workdir.followed)] == [20, 40]
