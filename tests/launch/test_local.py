"""The plan of the local backend, and the lines that --dry_run prints of it."""

import json
import math
import subprocess

import pytest

from launch.binding import Cpu, Machine, Shares
from launch.job import Host, Job
from launch.plan import plan


def machine(gpus=()):
    return Machine(tuple(Cpu(n, (0, n), 0) for n in range(4)), math.inf, tuple(gpus))


def job(workers=2, gpus=(), **changes):
    fields = {
        "command": ("train", "--epochs=3"),
        "directory": "/home/a b",
        "environ": {},
        "hosts": (Host("127.0.0.1", workers, machine(gpus)),),
        "shares": Shares(),
        "slots": tuple(range(workers)),
        "ports": tuple(range(4000, 4000 + workers)),
    }
    return Job(**{**fields, **changes})


def test_cluster_and_roles_are_those_of_tf_config():
    tasks = plan(job(evaluator=True))
    configs = [json.loads(task.env["TF_CONFIG"]) for task in tasks]
    cluster = {"worker": ["127.0.0.1:4000", "127.0.0.1:4001"]}
    assert configs == [
        {"cluster": cluster, "task": {"type": "worker", "index": 0}},
        {"cluster": cluster, "task": {"type": "worker", "index": 1}},
        {"cluster": cluster, "task": {"type": "evaluator", "index": 0}},
    ]
    assert [task.name for task in tasks] == ["worker 0", "worker 1", "evaluator"]


def test_left_out_place_keeps_its_gpus_and_gives_up_its_cpus():
    tasks = plan(job(workers=4, gpus="0123", slots=(0, 2), ports=(4000, 4001)))
    assert [task.env["DIST_LAUNCH_INDEX"] for task in tasks] == ["0", "1"]
    assert [task.env["DIST_LAUNCH_LOCAL_INDEX"] for task in tasks] == ["0", "2"]
    assert [task.env["CUDA_VISIBLE_DEVICES"] for task in tasks] == ["0", "2"]
    assert [task.place.cpus for task in tasks] == [(0, 1), (2, 3)]


def test_evaluator_gets_the_gpus_that_are_left_or_none():
    assert plan(job(gpus="012", evaluator=True))[-1].env["CUDA_VISIBLE_DEVICES"] == "2"
    assert plan(job(gpus="01", evaluator=True))[-1].env["CUDA_VISIBLE_DEVICES"] == "-1"


def test_machine_without_gpus_leaves_the_variable_alone():
    assert "CUDA_VISIBLE_DEVICES" not in plan(job())[0].env


@pytest.mark.parametrize("name", ["no_proxy", "NO_PROXY"])
def test_proxy_exceptions_are_extended(name):
    [task, _] = plan(job(environ={name: "example.org,127.0.0.1"}))
    assert task.env[name] == "example.org,127.0.0.1"
    [task, _] = plan(job(environ={name: "example.org"}))
    assert task.env[name] == "example.org,127.0.0.1"


def test_interop_threads_are_set_on_one_cpu_only():
    assert plan(job(workers=4))[0].env["TF_NUM_INTEROP_THREADS"] == "1"
    assert "TF_NUM_INTEROP_THREADS" not in plan(job(workers=2))[0].env


def test_shell_line_is_exact():
    [task] = plan(job(workers=1, command=("sh", "-c", "echo $HOME 'x'")))
    line = task.shell_line()
    assert line.startswith("cd '/home/a b' && env 'TF_CONFIG={")
    assert line.endswith("""taskset -c 0,1,2,3 sh -c 'echo $HOME '"'"'x'"'"''""")


def test_dry_run_lines_do_in_a_shell_what_the_launcher_does(launcher, python, tmp_path):
    command = python("""
names = [n for n in os.environ if n.startswith(("DIST_LAUNCH_", "TF_NUM", "OMP_", "NO_PROXY"))]
names = [n for n in names if n not in ("DIST_LAUNCH_HEARTBEAT", "DIST_LAUNCH_TEST")]
print([(n, os.environ[n]) for n in sorted(names)], os.sched_getaffinity(0), os.getcwd(), sys.argv)
""")
    launched = launcher.run("--workers=2", *command, "it's", "$HOME")
    dry = launcher.run("--workers=2", "--dry_run", *command, "it's", "$HOME")
    assert dry.status == 0
    # The source has line breaks of its own: a shell reads the lines as one script.
    pasted = subprocess.run(["sh"], input=dry.out, capture_output=True, check=True).stdout
    lines = [line.partition(b"] ")[2] for line in sorted(launched.out.splitlines())]
    assert sorted(pasted.splitlines()) == sorted(lines)


def test_dry_run_starts_nothing(launcher, tmp_path):
    result = launcher.run("--dry_run", "--log_dir=logs", "--", "touch", "started")
    assert result.status == 0
    assert list(tmp_path.iterdir()) == []
