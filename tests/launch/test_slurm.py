"""The batch script of the Slurm backend, and what is refused before anything is submitted."""

import os
import shlex
import subprocess

import pytest

from launch.errors import UsageError
from launch.slurm import client, script
from launch.slurm.script import Request


def request(**changes):
    return Request(
        **{"command": ("train", "--epochs=3"), "directory": "/home/a", "workers": 4, **changes}
    )


def options(text):
    lines = [line for line in text.splitlines() if line.startswith("#SBATCH ")]
    return [shlex.split(line.removeprefix("#SBATCH "))[0] for line in lines]


def test_script_asks_for_what_was_asked_for():
    asked = options(
        script.plan(
            request(
                partition="long",
                account="me",
                time="8:00:00",
                nodes=2,
                cpus_per_worker=3,
                gpus_per_worker=1,
                options=("--mem=4G", "--time=9:00:00"),
            )
        )
    )
    expected = {
        *("--ntasks=4", "--nodes=2", "--cpus-per-task=3", "--gpus-per-task=1", "--requeue"),
        *("--partition=long", "--account=me", "--open-mode=append", "--signal=TERM@120"),
        "--chdir=/home/a",
    }
    assert expected <= set(asked)
    # Slurm takes the last one.
    assert asked[-2:] == ["--mem=4G", "--time=9:00:00"]


def test_script_leaves_to_slurm_what_was_not_asked_for():
    asked = " ".join(options(script.plan(request())))
    for option in ("--nodes", "--cpus", "--gpus", "--partition", "--account", "--time"):
        assert option not in asked


def test_step_ends_with_its_first_failure_and_keeps_older_logs():
    text = script.plan(request(log_dir="my %logs", cpus_per_worker=2))
    [line] = [line for line in text.splitlines() if line.startswith("srun ")]
    assert shlex.split(line) == [
        *("srun", "--kill-on-bad-exit=1", "--wait=60", "--cpus-per-task=2"),
        *("--output=my %%logs/worker-%t.log", "--open-mode=append", "train", "--epochs=3"),
    ]


@pytest.mark.parametrize(
    "argument", ["a b", "it's", '"', "$HOME", "`id`", "\n#SBATCH --x", "{}", ";"]
)
def test_command_comes_through_a_shell_as_it_is(argument, tmp_path):
    printer = "import sys; print(sys.argv[1:])"
    text = script.plan(request(command=("python3", "-c", printer, argument)))
    (tmp_path / "srun").write_text('#!/bin/sh\nshift 3\nexec "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash"], input=text.encode(), env=environ, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode() == f"{[argument]}\n"


@pytest.mark.parametrize(
    "changes",
    [
        {"directory": "/a\n#SBATCH"},
        {"partition": "a\nb"},
        {"account": "a\r"},
        {"time": "1\x00"},
        {"options": ("--mem=1\nid",)},
    ],
)
def test_value_that_would_leave_its_line_is_refused(changes):
    with pytest.raises(UsageError, match=r"would not stay on its #SBATCH line|no option of sbatch"):
        script.plan(request(**changes))


@pytest.mark.parametrize("option", ["mem", "4G", "", "--", "#", "--Mem"])
def test_what_is_no_option_is_refused(option):
    with pytest.raises(UsageError, match="is no option of sbatch; write each as --name=value"):
        script.plan(request(options=(option,)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers=2:4"], "--workers=2:4: a Slurm job has one number of tasks; use --workers=4"),
        (["--evaluator"], "--evaluator has no meaning with --backend=slurm"),
        (["--slurm_options='"], "--slurm_options: No closing quotation"),
        (["--slurm_options=4G"], "--slurm_options: '4G' is no option of sbatch"),
        (["--slurm_nodes=-1"], "flag --slurm_nodes=-1"),
    ],
)
def test_flags_that_do_not_fit_are_usage_errors(launcher, arguments, message):
    result = launcher.run("--backend=slurm", *arguments, "--", "true")
    assert (result.status, result.out) == (2, b"")
    assert result.err.startswith(f"dist-launch: {message}")
    assert result.err.count("\n") == 1


def test_flag_of_slurm_needs_the_backend(launcher):
    result = launcher.run("--slurm_time=1", "--", "true")
    assert result.err == "dist-launch: --slurm_time needs --backend=slurm\n"


def test_machine_without_slurm_is_told_so(launcher, tmp_path):
    result = launcher.run("--backend=slurm", "--", "true", env={"PATH": str(tmp_path)})
    assert result.status == 127
    assert "command not found: sbatch; " in result.err
    assert "--dry_run" in result.err


def test_refusal_of_sbatch_is_shown(launcher, tmp_path):
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho sbatch: invalid partition >&2; exit 1\n")
    (tmp_path / "sbatch").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    result = launcher.run("--backend=slurm", "--", "true", env={"PATH": path})
    assert result.status == 1
    assert "invalid partition" in result.err


def test_state_is_read_from_what_scontrol_says(monkeypatch):
    said = """JobId=17 JobName=JobState=X
   JobState=FAILED Reason=NonZeroExitCode Dependency=(null)
   Requeue=1 Restarts=2 BatchFlag=1 Reboot=0 ExitCode=0:9
   StdOut=/home/a b/slurm-17.out
"""
    monkeypatch.setattr(client, "_run", lambda command: said)
    state = client.show("17")
    assert state == client.State("FAILED", "NonZeroExitCode", 2, 0, 9, "/home/a b/slurm-17.out")
    assert state.has_ended
    assert state.exit_status == 137


@pytest.mark.parametrize(("name", "status"), [("COMPLETED", 0), ("NODE_FAIL", 1), ("TIMEOUT", 1)])
def test_only_a_completed_job_is_a_success(name, status):
    assert client.State(name, "None", 0, 0, 0, "").exit_status == status
