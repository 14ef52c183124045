"""The command: exit statuses, one line for each error, and TensorFlow only where it is needed."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from absl import flags

from dist_train import Config, __main__, options

ROOT = Path(__file__).parents[2]
SLOW = pytest.mark.slow  # each starts TensorFlow
MINE = """
import dist_train, keras, numpy as np

def task():
    x = np.ones((8, 1), np.float32)
    model = lambda: keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    return dist_train.Task(model=model, train=dist_train.Arrays(x, x), loss="mse")
"""
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
        (["--batch_size=abc"], {}, "flag --batch_size=abc: not an integer"),
        (["--learning_rate=fast"], {}, "flag --learning_rate=fast: not a number"),
        (["--shuffle=maybe"], {}, "flag --shuffle=maybe: neither true nor false"),
        (["--flagfile=none"], {}, "error: Unable to open flagfile"),
        (["--strategy=mirrored", "--devices=1000"], {}, "devices"),
        (["--task=nothing"], {}, "is neither mnist nor of the form"),
        (["--task=none.py:task"], {}, "task file none.py does not exist"),
        (["--data_dir=none"], {}, "data_dir=none does not exist"),
        (["--lerning_rate=3"], {}, "unknown flag --lerning_rate; did you mean --learning_rate?"),
        (["--nodeterminsm"], {}, "unknown flag --nodeterminsm; did you mean --determinism?"),
        (["--frobnicate"], {}, "unknown flag --frobnicate; --helpfull lists all"),
        (["--strategy=ring"], {}, "strategy"),
        (["--devices=2"], {}, "use --strategy=mirrored"),
        (["--recipe=nosuch"], {}, "should be one of <cnn|fashion|guide|mlp>"),
        (["--batch_size=0", "--recipe=cnn"], {}, "batch_size"),
        (["extra"], {}, "unexpected argument 'extra'"),
        (["--strategy=multi_worker"], {}, "TF_CONFIG"),
        (["--strategy=multi_worker"], {"TF_CONFIG": "{"}, "not JSON"),
        ([], {"TF_CONFIG": TWO_WORKERS}, "TF_CONFIG has 2 workers"),
        (["--mode=evaluate", "--workdir=none"], {}, "does not exist"),
        (["--workdir=/proc/none"], {}, "cannot be written"),
        (["--mode=predict", "--workdir=none"], {}, "needs --predict_on"),
        (["--mode=predict", "--workdir=none", "--predict_on=a.png"], {}, "does not exist"),
        (["--output=a.csv"], {}, "output='a.csv' is for --mode=predict"),
        (["--compare=a"], {}, "give two runs or more"),
        (["--compare", "a", "b"], {}, "compare=a is no workdir of a run"),
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


def test_help_shows_the_main_flags_in_groups_and_helpfull_all(tmp_path):
    short, full = (command(name, cwd=tmp_path) for name in ("--help", "--helpfull"))
    assert short.returncode == full.returncode == 0
    assert len(short.stdout.splitlines()) <= 60
    assert max(map(len, short.stdout.splitlines())) <= 98
    for text in ("What to train", "  --batch_size=64  Examples per step", "--helpfull lists all"):
        assert text in short.stdout
    assert "--stall_timeout_s" not in short.stdout
    for field in dataclasses.fields(Config):
        assert re.search(rf"^ +--(\[no\])?{field.name}:", full.stdout, re.MULTILINE), field.name


def test_readme_names_each_flag_and_its_default(tmp_path):
    full = command("--helpfull", cwd=tmp_path).stdout
    ours = full.partition("dist_train.options:")[2].partition("\n\n")[0]
    defaults = {}
    for name, rest in re.findall(r"^ +--(?:\[no\])?(\w+):((?:.|\n(?! +--))*)", ours, re.MULTILINE):
        found = re.search(r"\(default:\s+'(.*)'\)", rest)
        defaults[name] = (found and found[1]) or "–"
    readme = (ROOT / "README.md").read_text().partition("\n## dist-train\n")[2]
    documented = {}
    for line in readme.partition("\nExit status")[0].splitlines():
        if not line.startswith("| `--"):
            continue
        flags, shown = line.split("|")[1:3]
        names = re.findall(r"--(\w+)", flags)
        values = [value.strip(" `") for value in shown.split(",")]
        assert len(values) in (1, len(names)), line
        documented.update(zip(names, values * (len(names) // len(values)), strict=True))
    assert documented == defaults
    settings = {field.name for field in dataclasses.fields(Config)}
    assert set(defaults) == settings | {"compare", "recipe"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--initial_weights=none.keras"], "none.keras"),
        pytest.param(["--task=json:nothing"], "json has no 'nothing'", marks=SLOW),
        pytest.param(["--model=transformer"], "not one of mlp, mlp512, cnn, cnn128", marks=SLOW),
        pytest.param(["--data_dir=file"], "neither a folder", marks=SLOW),
        pytest.param(["--validation_size=60000"], "leaves nothing of 60000", marks=SLOW),
        pytest.param(["--optimizer=sgdd"], "is not one of", marks=SLOW),
    ],
)
def test_what_is_wrong_in_task_or_data_is_one_line(tmp_path, arguments, message):
    (tmp_path / "file").touch()
    assert_one_line(command(*arguments, "--workdir=run", cwd=tmp_path), 2, message)


def test_an_error_in_the_users_own_code_is_one_line_and_its_traceback_a_flag_away(tmp_path):
    (tmp_path / "mine.py").write_text("def task():\n    return 1 / 0\n")
    arguments = ["--task=mine.py:task", "--workdir=run"]
    message = "error: mine.py:2: ZeroDivisionError: division by zero"
    assert_one_line(command(*arguments, cwd=tmp_path), 1, message)
    assert "Traceback" in command(*arguments, "--v=1", cwd=tmp_path).stderr


@SLOW
def test_a_script_of_several_runs_is_silent(tmp_path):
    script = MINE.replace(", keras, numpy", ", numpy").replace(
        "    x =", "    import keras\n    x ="
    )
    for _ in range(4):
        script += "dist_train.train(task, dist_train.Config(batch_size=8, epochs=1))\n"
    (tmp_path / "mine.py").write_text(script)
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    del environ["TF_CPP_MIN_LOG_LEVEL"]
    done = subprocess.run(
        [sys.executable, "mine.py"], cwd=tmp_path, env=environ, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert len(list((tmp_path / "runs").iterdir())) == 4


@SLOW
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_hindrance(tmp_path, closed):
    (tmp_path / "mine.py").write_text(MINE)
    line = f"{sys.executable} -m dist_train --task=mine.py:task --epochs=1 --workdir=run {closed}"
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run(line, shell=True, cwd=tmp_path, env=environ, timeout=120).returncode == 0
    assert (tmp_path / "run" / "report.html").exists()


def test_a_loss_that_is_nan_ends_with_status_1(tmp_path):
    done = command("--learning_rate=1e30", "--workdir=run", "--epochs=1", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: the loss of step 2 is nan")


@SLOW
def test_the_collector_leaves_tensorflow_alone_where_the_process_is_the_run_s(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import gc, dist_train, keras, numpy as np\n"
        "def task():\n"
        "    print('collects', gc.isenabled(), 'frozen', gc.get_freeze_count() > 100_000)\n"
        "    x = np.ones((8, 1), np.float32)\n"
        "    model = lambda: keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])\n"
        "    return dist_train.Task(model=model, train=dist_train.Arrays(x, x), loss='mse')\n"
        "if __name__ == '__main__':\n"
        "    dist_train.train(task, dist_train.Config(batch_size=8, epochs=1))\n"
    )
    done = command("--task=mine.py:task", "--batch_size=8", "--epochs=1", cwd=tmp_path)
    assert "collects True frozen True" in done.stdout, done.stderr
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "mine.py"], cwd=tmp_path, env=environ, capture_output=True, text=True
    )
    assert "collects True frozen False" in done.stdout, done.stderr


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


def test_two_runs_from_a_notebook_touch_no_state_of_absl(tmp_path):
    """A cell of a notebook: no file, an event loop that runs, and absl's flags not parsed."""
    code = """
import asyncio, logging, signal, sys
import numpy as np
from absl import flags, logging as absl_logging

def state():
    root = logging.getLogger()
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    return (flags.FLAGS.is_parsed(), sorted(flags.FLAGS), absl_logging.get_verbosity(),
            root.level, list(root.handlers), handlers)

async def cell():
    import dist_train, keras
    x = np.linspace(0, 1, 64, dtype=np.float32)[:, None]
    task = dist_train.Task(
        model=lambda: keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)]),
        train=dist_train.Arrays(x, 3 * x[:, 0]),
        loss=lambda y, outputs: (outputs[:, 0] - y) ** 2,
    )
    absl_logging.info("absl itself sets up logging at its first line, whoever writes it")
    before = state()
    for name in ("a", "b"):
        config = dist_train.Config(workdir=name, epochs=2, learning_rate=0.1)
        result = dist_train.train(task, config)
        assert result.step == 2, result
        print(result.metrics["train"]["loss"])
        assert state() == before, (state(), before)

asyncio.run(cell())
"""
    done = subprocess.run(
        [sys.executable, "-c", code, "--nosuchflag"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.split()
    assert first == second


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        (["--mode=evaluate"], True),
        (["--mode=evaluate", "--strategy=mirrored"], True),
        (["--mode=evaluate", "--strategy=multi-worker"], False),  # on the chief there is a folder
        (["--mode=follow"], False),
        ([], False),
    ],
)
def test_who_takes_settings_from_a_workdir(tmp_path, monkeypatch, given, taken):
    (tmp_path / "config.json").write_text('{"config": {"seed": 7}}')
    values = flags.FlagValues()
    options.define_flags(values)
    values(["dist-train", *given, f"--workdir={tmp_path}"])
    monkeypatch.setattr(__main__.flags, "FLAGS", values)
    assert __main__._saved() == ({"seed": 7} if taken else {})


@SLOW
def test_predictions_and_evaluations_take_the_settings_of_the_run(tmp_path):
    pictures, labels = np.zeros((64, 28, 28), np.uint8), np.zeros(64, np.uint8)
    arrays = {"x_train": pictures, "y_train": labels, "x_test": pictures, "y_test": labels}
    np.savez(tmp_path / "data.npz", **arrays)
    settings = ["--model=cnn", "--data_dir=data.npz", "--validation_size=0", "--optimizer=adam"]
    done = command(*settings, "--seed=3", "--epochs=1", "--workdir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("a", "b"):
        np.save(tmp_path / f"{name}.npy", np.zeros((2, 28, 28), np.uint8))
    predict = ["--mode=predict", "--workdir=run"]
    done = command(*predict, "--predict_on", "a.npy", "b.npy", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["file"], row["index"]) for row in rows] == [
        ("a.npy", 0), ("a.npy", 1), ("b.npy", 0), ("b.npy", 1)
    ]  # fmt: skip
    done = command("--mode=evaluate", "--workdir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "step 1  test: loss" in done.stderr
    done = command(*predict, "--predict_on=a.npy", "--seed=4", cwd=tmp_path)
    assert_one_line(done, 2, "seed=4 (was 3)")
    np.save(tmp_path / "a.npy", np.zeros((2, 28, 29), np.uint8))
    assert_one_line(
        command(*predict, "--predict_on=a.npy", cwd=tmp_path), 2, "the task's inputs are 28 x 28"
    )
