"""The batch script of the Slurm backend, and what is refused before anything is submitted."""

import os
import shlex
import signal
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


def test_logs_of_a_workdir_in_a_remote_store_go_to_the_jobs_own(launcher):
    command = ["--", "train", "--workdir=gs://bucket/run"]
    result = launcher.run("--backend=slurm", "--dry_run", *command)
    assert b"mkdir" not in result.out
    assert b"--label train --workdir=gs://bucket/run\n" in result.out


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


@pytest.fixture
def running_job(tmp_path):
    """A PATH on which job 17 runs until `cancelled` is there, which scancel makes."""
    programs = {
        "sbatch": "echo 17",
        "scancel": f"touch {tmp_path}/cancelled",
        "scontrol": f"[ -e {tmp_path}/cancelled ] && state=CANCELLED || state=RUNNING\n"
        'echo "   JobState=$state Reason=None ExitCode=0:0"',
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    return f"{tmp_path}:{os.environ['PATH']}"


def start_and_signal(launcher, path, number):
    process = launcher.start("--backend=slurm", "--", "true", env={"PATH": path})
    said = b""
    while b"job 17 is RUNNING" not in said:
        said = process.stderr.readline()
        assert said
    process.send_signal(number)
    return launcher.finish(process)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_job_goes_on_without_its_launchers_terminal(launcher, running_job, tmp_path, number):
    result = start_and_signal(launcher, running_job, number)
    assert f"{number.name}: job 17 goes on; scancel 17 ends it\n" in result.err
    assert result.status == 128 + number
    assert not (tmp_path / "cancelled").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_cancel_the_job(launcher, running_job, tmp_path, number):
    result = start_and_signal(launcher, running_job, number)
    assert "job 17 is being cancelled" in result.err
    assert result.status == 75
    assert (tmp_path / "cancelled").exists()


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


def test_workers_without_gpus_see_none_though_slurm_gives_some(launcher, tmp_path):
    def seen(*flags):
        dry = launcher.run("--backend=slurm", "--dry_run", *flags, "--", "sh", "-c", 'echo "$SEEN"')
        text = dry.out.decode().replace("SEEN", "CUDA_VISIBLE_DEVICES")
        environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        return subprocess.run(["bash"], input=text.encode(), env=environ, capture_output=True)

    (tmp_path / "srun").write_text('#!/bin/sh\nshift 3\nCUDA_VISIBLE_DEVICES=0,1 exec "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    assert seen("--gpus_per_worker=0").stdout == b"-1\n"
    assert seen("--gpus_per_worker=auto").stdout == seen().stdout == b"0,1\n"


def test_some_workers_are_shown_only_where_each_has_a_file(launcher):
    dry = ["--backend=slurm", "--dry_run"]
    result = launcher.run(*dry, "--tee=0,1", "--", "true")
    assert (result.status, result.out) == (2, b"")
    assert result.err.startswith("dist-launch: --tee=0,1 needs --log_dir or --workdir: ")
    for fitting in (["--tee=0", "--log_dir=a"], ["--tee=none"], ["--tee=0", "--quiet"]):
        assert launcher.run(*dry, *fitting, "--", "true").status == 0
    assert launcher.run(*dry, "--tee=0", "--", "true", "--workdir=a").status == 0


@pytest.mark.parametrize(
    ("flag", "workers", "has_own"),
    [("--tee=all", {0, 1}, True), ("--tee=1", {1}, True), ("--tee=none", set(), False)],
)
def test_what_the_job_itself_says_is_shown_beside_some_workers(
    launcher, tmp_path, flag, workers, has_own
):
    commands = {
        "sbatch": 'mkdir logs; for n in 0 1; do echo "from $n" > logs/worker-$n.log; done\n'
        "echo 'restart 1 of 3' > slurm-17.out; echo 17",
        "scontrol": f"echo '   JobState=COMPLETED'; echo '   StdOut={tmp_path}/slurm-17.out'",
    }
    for name, script_text in commands.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script_text}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    result = launcher.run(
        *("--backend=slurm", "--log_dir=logs", flag, "--", "train"), env={"PATH": path}
    )
    assert result.status == 0, result.err
    shown = {f"[worker {n}] from {n}" for n in workers}
    assert set(result.out.decode().splitlines()) == shown
    assert ("[job 17] restart 1 of 3\n" in result.err) == has_own
