"""A training in the pods of a generated Job, with this test as kubelet and as Job controller."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest
import yaml

import dist_train
from dist_train import metrics

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SETTINGS = {
    "task": f"{HERE / 'small.py'}:task",
    "epochs": 150,
    "eval_epochs": 0,
    "log_steps": 100,
    "checkpoint_steps": 50,
}
TRAIN = ["-m", "dist_train", *(f"--{name}={value}" for name, value in SETTINGS.items())]
WORKERS = 2


@pytest.fixture
def job(tmp_path):
    """The Job that the launcher prints, as a reader of YAML has it."""
    printed = subprocess.run(
        [
            *(sys.executable, "-m", "launch", "--backend=kubernetes", f"--workers={WORKERS}"),
            *("--name=mnist", "--image=mnist:1", "--cpu=1", f"--volume=runs:{tmp_path}/claim"),
            *("--", sys.executable, *TRAIN, "--strategy=multi_worker"),
            f"--workdir={tmp_path}/claim/run",
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        check=True,
        timeout=60,
    ).stdout
    return {d["kind"]: d for d in yaml.safe_load_all(printed)}["Job"]


@pytest.fixture
def start_pods(job, kubelet, group, addresses, tmp_path):
    """fn() -> the pods' processes. Their names lead to this machine, each to a port of its own."""
    kubelet.secrets["mnist-token"] = {"token": "of this test"}

    def start():
        template = job["spec"]["template"]
        [container] = template["spec"]["containers"]
        python, *arguments = container["command"]
        assert python == sys.executable
        pods = []
        names = [f"mnist-{index}.mnist:2222" for index in range(WORKERS)]
        network = dict(zip(names, addresses(WORKERS), strict=True))
        for index in range(job["spec"]["completions"]):
            environ = kubelet.environment(template, index)
            for name, address in network.items():
                assert name in environ["TF_CONFIG"]
                environ["TF_CONFIG"] = environ["TF_CONFIG"].replace(name, address)
            assert environ["HOME"] == "/tmp"  # an emptyDir, which lives as long as the pod
            home = tmp_path / f"pod-{len(group.processes)}"
            home.mkdir()
            environ |= {"HOME": str(home), "TMPDIR": str(home)}
            pods.append(group.start(arguments, environ=environ))
        return pods

    return start


def losses(workdir):
    rows = metrics.read_rows(workdir / "metrics.jsonl")
    return [(r["step"], r["loss"], r["batch_loss"]) for r in rows if r["kind"] == "train"]


def wait_for_step(pods, workdir, step, timeout_s=90):
    deadline = time.monotonic() + timeout_s
    while not any(reached >= step for reached, *_ in losses(workdir)):
        for pod in pods:
            assert pod.poll() is None, pod.log.read_text()
        assert time.monotonic() < deadline, pods[0].log.read_text()
        time.sleep(0.05)


@pytest.mark.slow
def test_an_evicted_pod_stops_all_and_their_successors_end_on_the_known_trajectory(
    job, start_pods, group, tmp_path
):
    dist_train.train(None, dist_train.Config(workdir=str(tmp_path / "whole"), **SETTINGS))
    run = tmp_path / "claim" / "run"
    pods = start_pods()
    wait_for_step(pods, run, 300)
    pods[1].send_signal(signal.SIGTERM)
    grace_s = job["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert [pod.wait(grace_s) for pod in pods] == [75, 75], group.output(0)
    on_exit = job["spec"]["podFailurePolicy"]["rules"][0]
    assert (on_exit["action"], 75 in on_exit["onExitCodes"]["values"]) == ("Ignore", True)

    pods = start_pods()  # so the Job controller replaces both
    assert [pod.wait(120) for pod in pods] == [0, 0], pods[0].log.read_text()
    assert "resumed after step" in pods[0].log.read_text()
    np.testing.assert_allclose(losses(run), losses(tmp_path / "whole"), rtol=2e-4, atol=2e-5)
    mine, theirs = (
        keras.saving.load_model(workdir / "model.keras").get_weights()
        for workdir in (run, tmp_path / "whole")
    )
    for a, b in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4)
