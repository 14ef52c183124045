"""Recipes: files that are whole, and that give way to the command line."""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from absl import flags
from equivalence import assert_same, run

import dist_train
from dist_train.mnist import files, task
from dist_train.options import define_flags, from_flags, parse

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "dist_train" / "recipes").iterdir())
NAMES = [path.stem for path in FILES]


def parsed(*arguments):
    values = flags.FlagValues()
    define_flags(values)
    assert parse(values, ["dist-train", *arguments]) == ["dist-train"]
    return from_flags(values)


def test_there_is_a_recipe_for_each_row_of_the_readme():
    readme = (ROOT / "README.md").read_text()
    assert NAMES == ["cnn", "fashion", "guide", "mlp"]
    for name in NAMES:
        assert f"`dist-train --recipe={name}" in readme


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_recipe_is_the_same_by_name_as_a_flagfile_and_from_python(path):
    config = parsed(f"--recipe={path.stem}")
    assert config == parsed(f"--flagfile={path}") == dist_train.recipe(path.stem)
    assert (config == dist_train.Config()) == (path.stem == "guide")
    assert path.read_text().startswith("# ")


@pytest.mark.parametrize("before", [True, False])
def test_the_command_line_wins_wherever_it_stands(before):
    arguments = ["--recipe=cnn"]
    arguments.insert(0 if before else 1, "--epochs=77")
    assert parsed(*arguments) == dist_train.recipe("cnn", epochs=77)
    assert dist_train.recipe("cnn").epochs != 77


def test_a_recipe_named_in_the_users_own_file_gives_way_to_it(tmp_path):
    (tmp_path / "mine").write_text("--epochs=77\n--recipe=cnn\n")
    assert parsed(f"--flagfile={tmp_path / 'mine'}") == dist_train.recipe("cnn", epochs=77)


def test_an_unknown_recipe_names_those_there_are():
    with pytest.raises(dist_train.UsageError, match=r"nosuch.*cnn.*fashion.*guide.*mlp"):
        dist_train.recipe("nosuch")
    with pytest.raises(dist_train.UsageError, match="batch_size=0 is below 1"):
        dist_train.recipe("cnn", batch_size=0)


def test_what_is_installed_has_them(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "dist_train", source / "dist_train")
    shutil.copytree(ROOT / "launch", source / "launch")
    code = "import setuptools; setuptools.setup()"
    built = tmp_path / "built"
    command = [sys.executable, "-c", code, "-q", "build", f"--build-lib={built}"]
    subprocess.run(command, cwd=source, check=True, capture_output=True, timeout=120)
    assert [path.name for path in FILES] == sorted(
        path.name for path in (built / "dist_train" / "recipes").iterdir()
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """300 examples of MNIST for training, of which 50 for validation, and 50 for the test."""
    path = tmp_path_factory.mktemp("data") / "data.npz"
    (x, y), (x_test, y_test) = files.read(None)
    arrays = {"x_train": x[:300], "y_train": y[:300], "x_test": x_test[:50], "y_test": y_test[:50]}
    np.savez(path, **arrays)
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes", "elsewhere"),
    [
        # guide: test_trajectory.py
        ("cnn", {}, {"strategy": "mirrored", "devices": 2, "input": "stream"}),
        ("mlp", {}, {"strategy": "mirrored", "devices": 2, "input": "stream"}),
        # Its dropout draws another mask on each replica; with another model the rest is alike.
        ("fashion", {}, {"input": "stream"}),
        ("fashion", {"model": "cnn128"}, {"strategy": "mirrored", "devices": 2, "input": "stream"}),
    ],
)
def test_a_recipe_starts_alike_elsewhere(tmp_path, data, name, changes, elsewhere):
    config = dist_train.recipe(
        name, data_dir=data, validation_size=50, epochs=2, log_steps=1, jit_compile="false",
        batch_size=75, warmup_steps=1, **changes,
    )  # fmt: skip
    settings = {
        key: value
        for key, value in dataclasses.asdict(config).items()
        if key not in ("task", "workdir", *elsewhere)
    }
    one = run(tmp_path / "one", task, **settings)
    assert_same(one, run(tmp_path / "two", task, **settings, **elsewhere))
    assert one.losses[0] != one.losses[-1]
