"""Trainings on hosts reached by ssh: the numbers of one process, also after a kill and a cut."""

import os
import re
import signal
import sys
import time

import hosts
import pytest
from trajectory import AT_ONCE, TRAIN, assert_same_run, wait_for_step

pytestmark = pytest.mark.slow

WORKER = ["--", sys.executable, *TRAIN, "--strategy=multi_worker", "--workdir=run"]


def trainer_on(host):
    trainers = [pid for pid, it in host.processes().items() if "dist_train" in it]
    assert trainers
    return min(trainers)


def test_workers_on_two_hosts_follow_the_trajectory_of_one_process(cluster, whole_run):
    status, output = cluster.run("--hosts=n1,n2", *WORKER, AT_ONCE, timeout_s=180)
    assert status == 0, output
    assert re.search(r"\[worker 0 n1\] .*done in .*: run holds report", output), output
    assert_same_run(cluster.folder / "run", whole_run)


def test_killed_worker_on_a_host_is_restarted_and_ends_on_the_same_weights(cluster, whole_run):
    process = cluster.start("--hosts=n1,n2", "--max_restarts=1", *WORKER)
    wait_for_step(cluster.folder / "run", 300, process)
    os.kill(trainer_on(cluster.network["n2"]), signal.SIGKILL)
    assert process.wait(180) == 0, process.log.read_text()
    output = process.log.read_text()
    assert re.search(r"first failure.*worker 1 \(pid \d+ on n2\): killed by SIGKILL", output)
    assert "resumed after step" in output
    assert_same_run(cluster.folder / "run", whole_run)


def test_cut_host_is_named_and_an_elastic_training_goes_on_without_it(cluster, whole_run):
    flags = ["--workers=2:3", "--max_restarts=2", "--link_timeout_s=5"]
    process = cluster.start("--hosts=n1,n2,n3", *flags, *WORKER)
    wait_for_step(cluster.folder / "run", 200, process)
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
    assert_same_run(cluster.folder / "run", whole_run)


def test_interrupted_training_saves_on_all_hosts_and_leaves_with_75(cluster, whole_run):
    process = cluster.start("--hosts=n1,n2", *WORKER)
    wait_for_step(cluster.folder / "run", 300, process)
    os.kill(process.inside, signal.SIGINT)
    assert process.wait(60) == 75, process.log.read_text()
    assert hosts.wait_until(lambda: cluster.alive() == {}, 15), cluster.alive()
    status, output = cluster.run("--hosts=n3,n1", *WORKER, timeout_s=180)
    assert status == 0, output
    assert "resumed after step" in output
    assert_same_run(cluster.folder / "run", whole_run)
