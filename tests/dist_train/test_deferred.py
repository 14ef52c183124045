"""Stand-ins for packages that another one imports without a use for them."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from dist_train.deferred import deferred

# What a run needs late or not at all; each takes tens to hundreds of milliseconds to import.
_LATE = {"matplotlib", "tensorboard", "tqdm"}

_FIRST_STEP = """
import sys
import dist_train
from dist_train.log import RunLog

train = RunLog.train

def first(self, row, *args, **options):
    if row["step"] == 1:
        print("at the first step:", *sys.modules)
    train(self, row, *args, **options)

RunLog.train = first

def task():
    import keras, numpy
    examples = dist_train.Arrays(numpy.ones((8, 3), "f"), numpy.ones(8, "i"))
    return dist_train.Task(
        model=lambda: keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)]), train=examples,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))

dist_train.train(task, dist_train.Config(workdir="run", batch_size=4, epochs=1, log_steps=1))
print("at the end:", *sys.modules)
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """`pictures`, which says so when it is imported, and `user`, which imports it."""
    for name, text in {
        "pictures/__init__.py": "import sys; sys.stdout.write('pictures '); size = 3",
        "pictures/plot.py": "import sys; sys.stdout.write('plot '); color = 'blue'",
        "pictures/other.py": "width = 5",
        "user.py": "import pictures.plot as plot\nfrom pictures import plot as again\n",
        "deep.py": "import pictures.other\nfrom pictures import size\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("pictures", "pictures.plot", "pictures.other", "user", "deep"):
        sys.modules.pop(name, None)


def test_a_deferred_package_is_imported_at_its_first_use(package, capsys):
    with deferred("pictures", "plot"):
        import user
    assert capsys.readouterr().out == ""
    assert not {"pictures", "pictures.plot"} & set(sys.modules)
    assert (user.plot.color, user.again.color) == ("blue", "blue")
    assert capsys.readouterr().out == "pictures plot "


def test_to_look_whether_it_is_there_is_no_use(package, capsys):
    with deferred("pictures", "plot"):
        import user

        assert importlib.util.find_spec("pictures") is not None
        for module in list(sys.modules.values()):  # as the inspect module does
            hasattr(module, "__file__")
    assert capsys.readouterr().out == ""
    assert user.plot.__file__.endswith("plot.py")


def test_an_import_afterwards_is_the_real_one(package, capsys):
    with deferred("pictures", "plot"):
        import user
    import pictures.plot

    assert capsys.readouterr().out == "pictures plot "
    assert pictures.plot.color == user.plot.color == "blue"
    assert "plot.py" in pictures.plot.__file__


def test_what_is_used_in_the_body_is_real(package):
    with deferred("pictures", "plot"):
        import deep
        import user
    assert deep.size == 3
    assert deep.pictures.other.width == 5
    assert user.plot.color == "blue"


def test_a_package_that_is_missing_stays_so(package):
    with deferred("no_such_pictures", "plot"), pytest.raises(ImportError):
        import no_such_pictures.plot  # noqa: F401


def test_a_package_that_was_imported_stays_as_it_is(package):
    import pictures

    with deferred("pictures", "plot"):
        import user
    assert user.plot is sys.modules["pictures.plot"]
    assert pictures.plot is user.plot


def test_an_error_of_the_body_leaves_no_stand_in(package):
    with pytest.raises(ValueError, match="body"), deferred("pictures", "plot"):
        raise ValueError("body")
    assert "pictures" not in sys.modules


def test_the_first_step_waits_for_no_import_that_it_does_not_need(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", _FIRST_STEP],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    modules = {
        line.split(":")[0]: set(line.split(":")[1].split())
        for line in done.stdout.splitlines() if line.startswith("at the ")
    }  # fmt: skip
    assert "tensorflow" in modules["at the first step"]
    assert _LATE & modules["at the first step"] == set()
    assert {"matplotlib", "tensorboard"} <= modules["at the end"]
    assert Path(tmp_path, "run", "curves.png").exists()
