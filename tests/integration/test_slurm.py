"""Trainings on a real Slurm: the cluster of a step, kills, cancels, requeues and the time limit."""

import json
import os
import re
import signal
import subprocess
import sys

import hosts
import pytest
import slurm_cluster
from trajectory import SMALL, TRAIN, assert_same_run, steps, wait_for_step

from dist_train.environments import nodelist

pytestmark = pytest.mark.skipif(
    bool(slurm_cluster.why_not()), reason=slurm_cluster.why_not() or "-"
)

# What a worker makes of its step.
SAY = """
import json, os
from dist_train.environments import find_cluster
cluster = find_cluster(os.environ, "multi_worker", 1.0)
print(json.dumps([cluster.index, os.environ["SLURMD_NODENAME"], cluster.addresses]))
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    with hosts.Network(folder, ["n1", "n2"]) as network:
        cluster = slurm_cluster.Slurm(network, folder)
        yield cluster
        cluster.end()


@pytest.fixture
def launch(slurm, tmp_path):
    """fn(*flags) -> a launcher of two workers on two nodes; nothing of it is left afterwards."""
    started = []

    def start(*flags, command=(*TRAIN, "--strategy=multi_worker", "--workdir=run")):
        log = tmp_path / "launcher.log"
        with log.open("wb") as file:
            arguments = ["-m", "launch", "--backend=slurm", "--slurm_nodes=2", *flags, "--"]
            process = slurm.start(
                [sys.executable, *arguments, sys.executable, *command],
                cwd=tmp_path,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        process.log = log
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.kill(process.inside, signal.SIGKILL)
    slurm.run(["scancel", "--user=root"])
    assert slurm_cluster.wait(lambda: not slurm.tasks(), 60), slurm.tasks()


def job_of(process):
    """The id of the job that a launcher has submitted."""
    pattern = re.compile(r"job (\d+) is submitted")
    assert hosts.wait_until(lambda: pattern.search(process.log.read_text()), 30)
    return pattern.search(process.log.read_text())[1]


def restart_soon(slurm, job, **changes):
    """Waits until the job is requeued, and spares it most of Slurm's pause before the next start.

    Not all of it: slurmctld kills what starts within the second of its requeue ("job credential
    revoked"), and then the job has failed for good.
    """
    pending = slurm_cluster.wait(lambda: slurm.state(job)["JobState"] == "PENDING", 90)
    assert pending, slurm.state(job)
    changes = [f"{name}={value}" for name, value in {"StartTime": "now+3", **changes}.items()]
    slurm.run(["scontrol", "update", f"JobId={job}", *changes])


@pytest.mark.parametrize(
    "text",
    [
        "n[1-3,7]",
        "n[001-010]",
        "n[08-11]",
        "n[8-11]",
        "rack[1-2]n[1-2]",
        "rack[2,1]n[5,1-2],m",
        "a,b,c3",
        "n[2,10],n1",
        "n[1-2,2]",
    ],
)
def test_node_list_expands_as_scontrol_does_it(slurm, text):
    assert nodelist.expand(text) == slurm.run(["scontrol", "show", "hostnames", text]).split()


@pytest.mark.parametrize("layout", [[], ["-m", "block"], ["-m", "cyclic"], ["-m", "plane=2"]])
@pytest.mark.parametrize("tasks", [2, 5])
def test_tasks_agree_on_who_runs_where(slurm, tmp_path, layout, tasks):
    command = ["srun", "-N2", f"-n{tasks}", *layout, sys.executable, "-c", SAY]
    lines = slurm.run(command, cwd=tmp_path, timeout_s=60).splitlines()
    # srun itself says so when the tasks before have not left yet.
    said = sorted(json.loads(line) for line in lines if not line.startswith("srun: "))
    assert [index for index, *_ in said] == list(range(tasks))
    addresses = said[0][2]
    assert [address.split(":")[0] for address in addresses] == [node for _, node, _ in said]
    assert all(others == addresses for *_, others in said)
    assert len(set(addresses)) == tasks


def test_step_of_two_tasks_is_not_trained_twice_by_default(slurm, tmp_path):
    command = ["srun", "-N2", "-n2", sys.executable, *TRAIN, "--workdir=run"]
    process = slurm.start(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert output.count(b"this Slurm step has 2 workers but strategy=default") == 2
    assert not (tmp_path / "run").exists()


def test_batch_shell_is_told_to_use_srun(slurm, tmp_path):
    script = f"#!/bin/sh\n{sys.executable} -m dist_train --strategy=multi_worker --workdir=run\n"
    command = ["sbatch", "--parsable", "--wait", "-n2", "-N2", "--output=out"]
    (tmp_path / "job").write_text(script)
    process = slurm.start([*command, "job"], cwd=tmp_path, stdout=subprocess.DEVNULL)
    assert process.wait(60) == 2
    assert "put srun before the command" in (tmp_path / "out").read_text()


# Of the other task: Slurm ends one that is not there yet for another reason.
WAIT_FOR_UP = "until [ -e up ]; do sleep 0.1; done"


@pytest.mark.parametrize(("end", "status"), [("exit 7", 7), ("kill -SEGV $$", 139)])
def test_status_of_the_job_is_the_launchers(slurm, launch, end, status):
    command = ["-c", "import os, sys; os.execvp('sh', ['sh', '-c', sys.argv[1]])"]
    script = f"[ $SLURM_PROCID = 0 ] && exec touch up; {WAIT_FOR_UP}; echo oh no; {end}"
    launcher = launch("--log_dir=logs", command=[*command, script])
    assert launcher.wait(60) == status, launcher.log.read_text()
    assert "[worker 1] oh no" in launcher.log.read_text()


def test_failed_task_takes_the_others_with_it_and_is_named(slurm, launch):
    script = f"""
import os, subprocess, time
if os.environ["SLURM_PROCID"] == "1":
    subprocess.run("{WAIT_FOR_UP}", shell=True)
    1 / 0
open("up", "w").close()
time.sleep(60)
"""
    launcher = launch("--log_dir=logs", command=["-c", script])
    # srun's status is the highest of the tasks', and it has sent SIGTERM to this one.
    assert launcher.wait(60) == 128 + signal.SIGTERM, launcher.log.read_text()
    assert "[worker 1] ZeroDivisionError" in launcher.log.read_text()
    assert "n2: task 1: Exited with exit code 1" in launcher.log.read_text()


def test_script_of_a_dry_run_can_be_piped_into_sbatch(slurm, tmp_path):
    folder = tmp_path / "it's a folder #1"
    folder.mkdir()
    script = "echo $SLURM_PROCID $(pwd) $1"
    command = ["--backend=slurm", "--dry_run", "--log_dir=my logs", "--", "sh", "-c", script, "x"]
    printed = subprocess.run(
        [sys.executable, "-m", "launch", *command, "a  'b'\n$HOME"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(slurm_cluster.ROOT)},
        stdout=subprocess.PIPE,
        check=True,
    ).stdout
    assert list(folder.iterdir()) == []
    (tmp_path / "job").write_bytes(printed)
    slurm.run(["sbatch", "--wait", tmp_path / "job"], cwd="/", timeout_s=60)
    for task in (0, 1):
        assert (folder / "my logs" / f"worker-{task}.log").read_text() == (
            f"{task} {folder} a 'b' $HOME\n"
        )


@pytest.mark.slow
def test_a_job_whose_task_is_killed_is_requeued_and_ends_on_the_uninterrupted_weights(
    slurm, launch, tmp_path, whole_run
):
    launcher = launch("--max_restarts=1")
    wait_for_step(tmp_path / "run", 300, launcher)
    [victim] = slurm.trainers("n2")
    os.kill(victim, signal.SIGKILL)
    restart_soon(slurm, job_of(launcher))
    assert launcher.wait(180) == 0, launcher.log.read_text()
    text = launcher.log.read_text()
    assert "restart 1 of 1; it is requeued" in text
    assert "resumed after step" in text
    assert_same_run(tmp_path / "run", whole_run)


@pytest.mark.slow
def test_a_job_that_is_requeued_by_slurm_saves_before_and_goes_on(
    slurm, launch, tmp_path, whole_run
):
    launcher = launch()
    job = job_of(launcher)
    wait_for_step(tmp_path / "run", 300, launcher)
    slurm.run(["scontrol", "requeue", job])
    restart_soon(slurm, job)
    assert launcher.wait(180) == 0, launcher.log.read_text()
    stopped = re.search(r"SIGTERM after step ([\d,]+), saved", launcher.log.read_text())
    assert f"resumed after step {stopped[1]}" in launcher.log.read_text()
    assert slurm.state(job)["Restarts"] == "1"
    assert_same_run(tmp_path / "run", whole_run)


@pytest.mark.slow
def test_a_job_at_its_time_limit_is_requeued_without_a_count(slurm, launch, tmp_path, whole_run):
    # Slurm looks at the limits twice a minute: a training that lasts until it does.
    command = [*TRAIN, f"--task={SMALL}:slow", "--strategy=multi_worker", "--workdir=run"]
    launcher = launch("--slurm_time=10", "--max_restarts=0", command=command)
    job = job_of(launcher)
    wait_for_step(tmp_path / "run", 100, launcher)
    assert hosts.wait_until(lambda: run_seconds(slurm, job) > 12, 30)
    slurm.run(["scontrol", "update", f"JobId={job}", "TimeLimit=2"])
    restart_soon(slurm, job, TimeLimit=10)
    assert launcher.wait(180) == 0, launcher.log.read_text()
    assert "at its time limit or preempted; it is requeued" in launcher.log.read_text()
    assert "resumed after step" in launcher.log.read_text()
    assert_same_run(tmp_path / "run", whole_run)


def run_seconds(slurm, job):
    hours, minutes, seconds = slurm.state(job)["RunTime"].split(":")
    return 3600 * int(hours) + 60 * int(minutes) + int(seconds)


@pytest.mark.slow
def test_ctrl_c_cancels_the_job_which_saves_and_leaves_nothing(slurm, launch, tmp_path):
    launcher = launch()
    wait_for_step(tmp_path / "run", 100, launcher)
    os.kill(launcher.inside, signal.SIGINT)
    assert launcher.wait(60) == 75, launcher.log.read_text()
    assert slurm.state(job_of(launcher))["JobState"] == "CANCELLED"
    assert re.search(r"SIGTERM after step [\d,]+, saved", launcher.log.read_text())
    assert slurm_cluster.wait(lambda: not slurm.tasks(), 20), slurm.tasks()


@pytest.mark.slow
def test_a_job_outlives_its_launcher_and_scancel_leaves_nothing_of_it(slurm, launch, tmp_path):
    launcher = launch()
    job = job_of(launcher)
    wait_for_step(tmp_path / "run", 100, launcher)
    os.kill(launcher.inside, signal.SIGKILL)
    launcher.wait(10)
    before = steps(tmp_path / "run")
    wait_for_step(tmp_path / "run", before[-1] + 100)
    slurm.run(["scancel", job])
    ended = slurm_cluster.wait(lambda: slurm.state(job)["JobState"] == "CANCELLED", 40)
    assert ended, slurm.state(job)
    assert slurm_cluster.wait(lambda: not slurm.tasks(), 20), slurm.tasks()
    assert any((tmp_path / "run" / "checkpoints").iterdir())
