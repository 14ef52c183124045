"""The command line: what a user sees before anything starts."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch import __main__ as main

ROOT = Path(__file__).parents[2]
SSH = ["--backend=ssh"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--workrs=2", "--", "true"],
            "Unknown command line flag 'workrs'. Did you mean: workers ?",
        ),
        (["--workers=0", "true"], "flag --workers=0: must be a positive number, or MIN:MAX"),
        (["--workers=3:2", "true"], "flag --workers=3:2: must be"),
        (["--workers=two", "true"], "flag --workers=two: must be"),
        (["--backend=pbs", "true"], "flag --backend=pbs: must be local, ssh, slurm, mpi or"),
        (["--hosts=n1", "true"], "--hosts needs --backend=ssh"),
        (
            ["--link_timeout_s=3", "--backend=kubernetes", "true"],
            "--link_timeout_s needs --backend=ssh",
        ),
        (["--backend=ssh", "true"], "--backend=ssh needs --hosts=n1,n2:2 or --hostfile=FILE"),
        ([*SSH, "--hosts=n1", "--hostfile=x", "true"], "--backend=ssh needs --hosts"),
        ([*SSH, "--hosts=n1:0", "true"], "--hosts=n1:0: n1 has no slot"),
        ([*SSH, "--hosts=n1", "--workers=2", "true"], "--workers=2 is more than the slots"),
        ([*SSH, "--hostfile=/no/such", "true"], "--hostfile=/no/such: No such file"),
        ([*SSH, "--hosts=n1", "--ssh_options='", "true"], "--ssh_options=': No closing quotation"),
        ([*SSH, "--hosts=n1", "--env=NOT_SET", "true"], "--env: NOT_SET is not set; set it"),
        ([*SSH, "--hosts=n1", "--link_timeout_s=1", "true"], "flag --link_timeout_s=1"),
        (["--max_restarts=-1", "true"], "flag --max_restarts=-1"),
        (["--threads=many", "true"], "flag --threads=many: must be auto or a positive number"),
        (["--gpus_per_worker=x", "true"], "flag --gpus_per_worker=x: must be auto, 0 or"),
        (["--gpus_per_worker=1", "true"], "2 workers need 2 GPUs and 0 are visible"),
        (["--cpu_bind=socket", "true"], "flag --cpu_bind=socket"),
        (["--tee=first", "true"], "flag --tee=first: must be all, none, or worker numbers"),
        (["--stall_timeout_s=0", "true"], "flag --stall_timeout_s=0"),
        (
            ["--log_dir=gs://a/logs", "true"],
            "--log_dir=gs://a/logs: logs are files of the launcher's",
        ),
        (
            ["--backend=kubernetes", "--image=a", "--grace_period_s=inf", "true"],
            "--grace_period_s=inf: a pod has a number of whole seconds; use 86400 for a day",
        ),
        (["--workers=2"], "no command: put it after the flags"),
        ([], "no command: put it after the flags"),
    ],
)
def test_usage_errors_are_2_and_one_line(launcher, arguments, message):
    result = launcher.run(*arguments, env={"CUDA_VISIBLE_DEVICES": ""})
    assert result.status == 2
    assert result.err.startswith(f"dist-launch: {message}")
    assert result.err.count("\n") == 1
    assert result.out == b""


@pytest.mark.parametrize(
    ("backend", "flag", "remedy"),
    [
        ("slurm", "--hosts=n1", "use --slurm_options=--nodelist=n1,n2"),
        ("slurm", "--hostfile=x", "use --slurm_options=--nodefile=FILE"),
        ("slurm", "--env=A", "Slurm carries the whole environment over, see --slurm_options="),
        ("mpi", "--hosts=n1", "use --mpi_options='--host n1:2,n2:2'"),
        ("mpi", "--hostfile=x", "use --mpi_options='--hostfile FILE'"),
        ("mpi", "--env=A", "use --mpi_options='-x NAME'"),
        ("kubernetes", "--hosts=n1", "use --workers"),
        ("kubernetes", "--hostfile=x", "use --workers"),
        ("kubernetes", "--env=A", "put `env NAME=value` before the command"),
    ],
)
def test_flag_that_a_backend_replaces_is_refused_with_what_it_has_instead(
    launcher, backend, flag, remedy
):
    result = launcher.run(f"--backend={backend}", flag, "--", "true")
    name = flag.partition("=")[0]
    assert (result.status, result.out) == (2, b"")
    message = f"dist-launch: {name} has no meaning with --backend={backend}; {remedy}"
    assert result.err.startswith(message)


def test_help_names_every_flag(launcher):
    result = launcher.run("--help")
    assert result.status == 0
    for flag in main.options.FLAGS:
        assert re.search(rf"--(\[no\])?{flag}:".encode(), result.out)


def test_help_comes_at_once_since_nothing_is_loaded_that_starts_workers():
    source = """
import sys
import launch.__main__
sys.argv = ["dist-launch", "--help"]
try:
    launch.__main__.run()
finally:
    print(*sys.modules, file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", source], env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0
    loaded = set(done.stderr.splitlines()[-1].split())
    assert "launch.options" in loaded
    late = ["binding", "group", "output", "process", "ssh", "supervisor", "survey"]
    assert not loaded & {*(f"launch.{name}" for name in late), "numpy", "tensorflow", "dist_train"}


@pytest.mark.parametrize("backend", ["local", "slurm", "mpi"])
def test_deleted_working_directory_is_said_in_one_line(launcher, backend):
    def delete():
        os.mkdir("gone")
        os.chdir("gone")
        os.rmdir("../gone")

    arguments = [f"--backend={backend}", "--dry_run", "--", "true"]
    result = launcher.run(*arguments, preexec_fn=delete)
    assert result.status == 2
    assert result.err == (
        "dist-launch: the working directory, in which the workers would run, has been deleted; cd"
        " to one that exists\n"
    )


def test_workdir_in_a_remote_store_makes_no_folder_here(launcher, tmp_path):
    result = launcher.run("--workers=1", "--", "echo", "--workdir=gs://bucket/run")
    assert result.status == 0, result.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dashes", [["--"], []])
def test_what_follows_the_command_belongs_to_it(launcher, dashes):
    result = launcher.run("--workers=1", *dashes, "echo", "--workers=7", "--", "-x")
    assert result.out == b"[worker 0] --workers=7 -- -x\n"


def test_flagfile_is_read(launcher, tmp_path):
    (tmp_path / "flags").write_text("--workers=3\n")
    result = launcher.run("--flagfile=flags", "--", "echo", "hi")
    assert result.out.count(b"hi") == 3


def test_worker_reads_no_input(launcher):
    result = launcher.run("--workers=1", "--", "cat", stdin=subprocess.PIPE)
    assert result.status == 0


def test_command_is_found_on_the_path_and_by_a_relative_name(launcher, tmp_path):
    script = tmp_path / "my script"
    script.write_text("#!/bin/sh\necho $#\n")
    script.chmod(0o755)
    assert launcher.run("--workers=1", "--", "./my script", "a b").out == b"[worker 0] 1\n"
    path = f"{tmp_path}:{os.environ['PATH']}"
    assert launcher.run("--workers=1", "my script", env={"PATH": path}).out == b"[worker 0] 0\n"


def test_sixteen_workers_at_once(launcher):
    result = launcher.run("--workers=16", "--", "sh", "-c", "echo $DIST_LAUNCH_INDEX")
    assert result.status == 0
    assert sorted(map(int, (line.split()[-1] for line in result.out.splitlines()))) == list(
        range(16)
    )


def test_evaluator_runs_beside_the_workers_and_may_fail(launcher):
    script = (
        "echo $DIST_LAUNCH_ROLE; [ $DIST_LAUNCH_ROLE = evaluator ] && exit 4; sleep 0.5; echo end"
    )
    result = launcher.run("--workers=2", "--evaluator", "--", "sh", "-c", script)
    assert b"[evaluator] evaluator\n" in result.out
    assert result.out.count(b"end\n") == 2
    assert "the training goes on without its evaluator: evaluator (pid " in result.err
    assert result.status == 4


def test_evaluator_that_does_not_end_is_stopped_after_the_training(launcher):
    script = "[ $DIST_LAUNCH_ROLE = worker ] || exec sleep 60"
    result = launcher.run("--evaluator", "--stall_timeout_s=0.5", "--", "sh", "-c", script)
    assert result.status == 0
    assert "the evaluator does not end" in result.err


def test_neither_tensorflow_nor_the_trainer_is_imported():
    code = """
import pkgutil, sys, launch
for module in pkgutil.walk_packages(launch.__path__, "launch."):
    __import__(module.name)
print({name.split(".")[0] for name in sys.modules} & {"tensorflow", "numpy", "keras", "dist_train"})
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert run.stdout == b"set()\n"
