"""The command: exit statuses, one line for each error, and TensorFlow only where it is needed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SLOW = pytest.mark.slow  # each starts TensorFlow
TWO_WORKERS = '{"cluster": {"worker": ["a:1", "b:2"]}, "task": {"type": "worker", "index": 0}}'


def command(*arguments, cwd, **environ):
    environment = {k: v for k, v in os.environ.items() if k != "TF_CONFIG"} | environ
    return subprocess.run(
        [sys.executable, "-m", "dist_train", *map(str, arguments)],
        cwd=cwd,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def assert_one_line(done, status, message):
    assert done.returncode == status, done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "environ", "message"),
    [
        (["--batch_size=0"], {}, "batch_size"),
        (["--batch_sise=3"], {}, "Unknown command line flag 'batch_sise'"),
        (["--strategy=ring"], {}, "strategy"),
        (["--devices=2"], {}, "use --strategy=mirrored"),
        (["extra"], {}, "unexpected argument 'extra'"),
        (["--strategy=multi_worker"], {}, "TF_CONFIG"),
        (["--strategy=multi_worker"], {"TF_CONFIG": "{"}, "not JSON"),
        ([], {"TF_CONFIG": TWO_WORKERS}, "TF_CONFIG has 2 workers"),
        (["--mode=evaluate", "--workdir=none"], {}, "does not exist"),
        (["--workdir=/proc/none"], {}, "cannot be written"),
    ],
)  # fmt: skip
def test_what_is_wrong_before_tensorflow_starts_ends_at_once(tmp_path, arguments, environ, message):
    done = command("--v=0", *arguments, cwd=tmp_path, PYTHONPROFILEIMPORTTIME="1", **environ)
    imports = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    assert imports
    assert not any("tensorflow" in line or "keras" in line for line in imports)
    done.stderr = "\n".join(
        line for line in done.stderr.splitlines() if not line.startswith("import time:")
    )
    assert_one_line(done, 2, message)


def test_help_lists_the_flags(tmp_path):
    done = command("--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "--batch_size" in done.stdout
    assert "--stall_timeout_s" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task=none.py:task"], "none.py does not exist"),
        (["--initial_weights=none.keras"], "none.keras"),
        pytest.param(["--task=nothing"], "is neither mnist nor of the form", marks=SLOW),
        pytest.param(["--task=json:nothing"], "json has no 'nothing'", marks=SLOW),
        pytest.param(["--model=transformer"], "not one of mlp, cnn", marks=SLOW),
        pytest.param(["--data_dir=none"], "neither a folder", marks=SLOW),
        pytest.param(["--validation_size=60000"], "leaves nothing of 60000", marks=SLOW),
        pytest.param(["--optimizer=sgdd"], "is not one of", marks=SLOW),
    ],
)
def test_what_is_wrong_in_task_or_data_is_one_line(tmp_path, arguments, message):
    assert_one_line(command(*arguments, "--workdir=run", cwd=tmp_path), 2, message)


def test_an_error_in_the_users_own_code_is_one_line_and_its_traceback_a_flag_away(tmp_path):
    (tmp_path / "mine.py").write_text("def task():\n    return 1 / 0\n")
    arguments = ["--task=mine.py:task", "--workdir=run"]
    assert_one_line(command(*arguments, cwd=tmp_path), 1, "ZeroDivisionError: division by zero")
    assert "Traceback" in command(*arguments, "--v=1", cwd=tmp_path).stderr


def test_a_loss_that_is_nan_ends_with_status_1(tmp_path):
    done = command("--learning_rate=1e30", "--workdir=run", "--epochs=1", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: the loss of step 2 is nan")


def test_tensorflow_is_not_imported_for_an_error_of_the_interface(tmp_path):
    code = (
        "import sys, dist_train\n"
        "for settings in ({}, {'strategy': 'multi_worker'}, {'workdir': '/proc/none'}):\n"
        "    try:\n"
        "        dist_train.train(config=dist_train.Config(**settings, devices=1))\n"
        "    except dist_train.UsageError as error:\n"
        "        print(error)\n"
        "assert not {'tensorflow', 'keras'} & set(sys.modules)\n"
    )
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CONFIG": "{"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("not JSON") == 3


def test_a_used_workdir_with_other_settings_is_refused_before_tensorflow(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"config": {"seed": 3}}')
    done = command("--workdir=run", cwd=tmp_path, PYTHONPROFILEIMPORTTIME="1")
    lines = done.stderr.splitlines()
    assert not any("tensorflow" in line for line in lines)
    done.stderr = "\n".join(line for line in lines if not line.startswith("import time:"))
    assert_one_line(done, 2, "seed=0 (was 3)")


def test_a_damaged_config_file_is_one_line(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"config": {"seed"')
    assert_one_line(command("--workdir=run", cwd=tmp_path), 2, "config.json is damaged")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "t10k-labels-idx1-ubyte").unlink(), "neither t10k-labels"),
        pytest.param(
            lambda folder: (folder / "train-images-idx3-ubyte").write_bytes(b""),
            "with nothing",
            marks=SLOW,
        ),
    ],
)
def test_bad_data_are_one_line_that_names_the_file(tmp_path, spoil, message):
    folder = tmp_path / "data"
    folder.mkdir()
    for stem, axes in (("images-idx3", 3), ("labels-idx1", 1)):
        for split in ("train", "t10k"):
            shape = [2, 28, 28][:axes]
            head = bytes((0, 0, 8, axes)) + b"".join(n.to_bytes(4, "big") for n in shape)
            size = 2 * 28 * 28 if axes == 3 else 2
            (folder / f"{split}-{stem}-ubyte").write_bytes(head + bytes(size))
    spoil(folder)
    done = command("--data_dir=data", "--workdir=run", cwd=tmp_path)
    assert_one_line(done, 2, message)
