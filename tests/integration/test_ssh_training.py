"""Trainings on hosts reached by ssh: the numbers of one process, also after a kill and a cut."""

import os
import re
import signal
import time
from pathlib import Path

import hosts
import keras
import numpy as np
import pytest

from dist_train import metrics

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
SETTINGS = ["--epochs=100", "--eval_epochs=0", "--log_steps=100", "--checkpoint_steps=50"]
TRAIN = ["-m", "dist_train", f"--task={HERE / 'small.py'}:task", *SETTINGS]
WORKER = ["--", "python", *TRAIN, "--strategy=multi_worker", "--workdir=train"]
LAST_STEP = 100 * 16


@pytest.fixture(scope="module")
def whole(new_group, tmp_path_factory):
    """The same run by one process, without a fault: its workdir."""
    folder = tmp_path_factory.mktemp("whole")
    group = new_group(folder)
    group.start([*TRAIN, "--workdir=train"])
    assert group.wait(180) == [0], group.output(0)
    return folder / "train"


def losses(workdir):
    rows = metrics.read_rows(Path(workdir) / "metrics.jsonl")
    return [(r["step"], r["loss"], r["batch_loss"]) for r in rows if r["kind"] == "train"]


def assert_same_run(workdir, other):
    assert losses(workdir)[-1][0] == LAST_STEP
    np.testing.assert_allclose(losses(workdir), losses(other), rtol=2e-4, atol=2e-5)
    mine, theirs = (
        keras.saving.load_model(d / "model.keras").get_weights() for d in (workdir, other)
    )
    for a, b in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4)


def wait_for_step(cluster, process, step):
    def reached():
        assert process.poll() is None, process.log.read_text()
        return any(number >= step for number, *_ in losses(cluster.folder / "train"))

    assert hosts.wait_until(reached, 120), process.log.read_text()


def trainer_on(host):
    trainers = [pid for pid, it in host.processes().items() if "dist_train" in it]
    assert trainers
    return min(trainers)


def test_workers_on_two_hosts_follow_the_trajectory_of_one_process(cluster, whole):
    status, output = cluster.run("--hosts=n1,n2", *WORKER, timeout_s=180)
    assert status == 0, output
    assert re.search(r"\[worker 0 n1\] .*done in .*: train holds report", output), output
    assert_same_run(cluster.folder / "train", whole)


def test_killed_worker_on_a_host_is_restarted_and_ends_on_the_same_weights(cluster, whole):
    process = cluster.start("--hosts=n1,n2", "--max_restarts=1", *WORKER)
    wait_for_step(cluster, process, 300)
    os.kill(trainer_on(cluster.network["n2"]), signal.SIGKILL)
    assert process.wait(180) == 0, process.log.read_text()
    output = process.log.read_text()
    assert re.search(r"first failure.*worker 1 \(pid \d+ on n2\): killed by SIGKILL", output)
    assert "resumed after step" in output
    assert_same_run(cluster.folder / "train", whole)


def test_cut_host_is_named_and_an_elastic_training_goes_on_without_it(cluster, whole):
    flags = ["--workers=2:3", "--max_restarts=2", "--link_timeout_s=5"]
    process = cluster.start("--hosts=n1,n2,n3", *flags, *WORKER)
    wait_for_step(cluster, process, 200)
    cluster.network["n3"].cut()
    begin = time.monotonic()
    named = "worker 2 was lost with n3: nothing came over the link for 5 s"
    assert hosts.wait_until(lambda: named in process.log.read_text(), 5 + 20)
    assert hosts.wait_until(lambda: "n3" not in cluster.alive(), 20), cluster.alive()
    assert time.monotonic() - begin < 5 + 40
    assert process.wait(180) == 0, process.log.read_text()
    output = process.log.read_text()
    assert "left out: n3: " in output
    assert "resumed after step" in output
    assert_same_run(cluster.folder / "train", whole)


def test_interrupted_training_saves_on_all_hosts_and_leaves_with_75(cluster, whole):
    process = cluster.start("--hosts=n1,n2", *WORKER)
    wait_for_step(cluster, process, 300)
    os.kill(process.inside, signal.SIGINT)
    assert process.wait(60) == 75, process.log.read_text()
    assert cluster.alive() == {}
    status, output = cluster.run("--hosts=n3,n1", *WORKER, timeout_s=180)
    assert status == 0, output
    assert "resumed after step" in output
    assert_same_run(cluster.folder / "train", whole)
