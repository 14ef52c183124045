"""The MPI backend: one command line."""

import shlex

import pytest

from launch import mpi


def test_plan_is_an_mpirun_with_the_users_options_before_the_command():
    line = mpi.plan(["train", "a b"], 4, ["--host", "n1:2,n2:2"], {})
    assert line == ["mpirun", "-n", "4", "--host", "n1:2,n2:2", "train", "a b"]


def test_tf_config_of_the_shell_does_not_reach_the_ranks():
    line = mpi.plan(["train"], 2, [], {"TF_CONFIG": "{}"})
    assert line == ["env", "--unset=TF_CONFIG", "mpirun", "-n", "2", "train"]


def test_dry_run_prints_the_line(launcher):
    result = launcher.run("--backend=mpi", "--workers=4", "--dry_run", "--", "train", "it's")
    words = shlex.split(result.out.decode())
    assert words[:2] == ["env", "OMPI_MCA_odls_base_sigkill_timeout=5"]
    assert words[2:] == ["mpirun", "-n", "4", "train", "it's"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers=2:4"], "--workers=2:4: mpirun has one number of ranks; use --workers=4"),
        (["--max_restarts=1"], "--max_restarts has no meaning with --backend=mpi"),
        (["--mpi_options='"], "--mpi_options: No closing quotation"),
    ],
)
def test_flags_that_do_not_fit_are_usage_errors(launcher, arguments, message):
    result = launcher.run("--backend=mpi", *arguments, "--", "true")
    assert (result.status, result.out) == (2, b"")
    assert result.err.startswith(f"dist-launch: {message}")


def test_flag_of_mpi_needs_the_backend(launcher):
    result = launcher.run("--mpi_options=-x", "--", "true")
    assert result.err == "dist-launch: --mpi_options needs --backend=mpi\n"


def test_machine_without_mpirun_is_told_so(launcher, tmp_path):
    result = launcher.run("--backend=mpi", "--", "true", env={"PATH": str(tmp_path)})
    assert result.status == 127
    assert "command not found: mpirun" in result.err
