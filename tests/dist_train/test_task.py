import sys

import keras
import numpy as np
import pytest

from dist_train import Arrays, Config, Task, UsageError
from dist_train.task import load, resolve, source_file

_EXAMPLES = Arrays(np.zeros((4, 3)), np.zeros(4))
_CONFIG = Config(seed=5)
_FILE = """
import numpy as np
from dist_train import Arrays, Task

class Note:
    pass

def made(**options):
    examples = Arrays(np.zeros((4, 3)), np.zeros(4))
    return Task(model=lambda: None, train=examples, loss="mse", **options)

plain = made()

def function():
    return plain

def with_config(config):
    return made(metrics={f"seed_{config.seed}": max})

def with_default(config=None):
    return made(metrics={f"seed_{config.seed}": max})

def no_task():
    return 3

def missing_data():
    open("/nowhere/data")

number = 3
"""


def _task(**changed) -> Task:
    return Task(**{"model": lambda: None, "train": _EXAMPLES, "loss": "mse"} | changed)


def test_a_file_of_another_folder_finds_its_neighbours(folder, tmp_path_factory, monkeypatch):
    (folder / "my_task_neighbour.py").write_text("from my_task_file import function\n")
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert isinstance(load(f"{folder}/my_task_neighbour.py:function", _CONFIG), Task)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a file and a package, as the current one."""
    (tmp_path / "my_task_file.py").write_text(_FILE)
    (tmp_path / "my_task_package").mkdir()
    (tmp_path / "my_task_package" / "__init__.py").touch()
    (tmp_path / "my_task_package" / "inner.py").write_text(_FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("my_task_")]:
        del sys.modules[name]


@pytest.mark.parametrize("module", ["my_task_file.py", "my_task_file", "my_task_package.inner"])
@pytest.mark.parametrize("name", ["plain", "function"])
def test_a_task_or_a_function_is_found_by_its_name(folder, module, name):
    assert load(f"{module}:{name}", _CONFIG) is sys.modules[module.removesuffix(".py")].plain


def test_a_file_is_found_by_any_path(folder):
    other = folder / "deeper"
    other.mkdir()
    (other / "my_task_other.py").write_text(_FILE)
    assert isinstance(load("deeper/my_task_other.py:plain", _CONFIG), Task)
    assert isinstance(load(f"{other / 'my_task_other.py'}:plain", _CONFIG), Task)


@pytest.mark.parametrize("name", ["with_config", "with_default"])
def test_a_function_may_take_the_config(folder, name):
    assert list(load(f"my_task_file.py:{name}", _CONFIG).metrics) == ["seed_5"]


def test_classes_of_a_file_can_be_found_by_their_module(folder):
    load("my_task_file.py:plain", _CONFIG)
    note = sys.modules["my_task_file"].Note
    assert sys.modules[note.__module__].Note is note


def test_the_built_in_task_is_mnist():
    task = load("mnist", Config(validation_size=1000))
    assert [len(s) for s in (task.train, task.validation, task.test)] == [59_000, 1000, 10_000]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("imagenet", "is neither mnist nor of the form"),
        ("", "is neither mnist nor of the form"),
        (":", "is neither mnist nor of the form"),
        ("my_task_file.py:", "is neither mnist nor of the form"),
        (":plain", "is neither mnist nor of the form"),
        ("my_task_file.py:none", "my_task_file.py has no 'none'"),
        ("my_task_none.py:task", "task file my_task_none.py does not exist"),
        ("my_task_package.py:task", "task file my_task_package.py does not exist"),
        ("my_task_none:task", "my_task_none cannot be imported: No module named"),
        ("my_task_package.none:task", "cannot be imported"),
        (".my_task_file:plain", "is relative"),
        ("..:plain", "is relative"),
        ("a..b:plain", "cannot be imported"),
        ("my_task_file.py:number", "the task is a int; it must be a dist_train.Task"),
        ("my_task_file.py:no_task", "the task is a int"),
        ("my_task_file.py:missing_data", "could not be made: .*No such file.*nowhere"),
    ],
)
def test_a_spec_without_a_task_is_an_error_of_one_line(folder, spec, message):
    with pytest.raises(UsageError, match=message) as caught:
        load(spec, _CONFIG)
    assert len(str(caught.value).splitlines()) == 1


def test_a_syntax_error_is_located(folder):
    (folder / "my_task_broken.py").write_text("x = 1\nx = = 2\n")
    with pytest.raises(UsageError, match=r"my_task_broken\.py, line 2: invalid syntax"):
        load("my_task_broken.py:x", _CONFIG)


def test_a_missing_import_of_the_task_is_named(folder):
    (folder / "my_task_broken.py").write_text("import my_task_none\n")
    with pytest.raises(UsageError, match="No module named 'my_task_none'"):
        load("my_task_broken.py:x", _CONFIG)


def test_a_file_takes_no_other_modules_place(folder):
    import json

    (folder / "json.py").write_text(_FILE)
    try:
        assert isinstance(load("json.py:plain", _CONFIG), Task)
        assert sys.modules["json"] is json
    finally:
        sys.modules["json"] = json


def test_a_file_is_read_again_by_a_second_run(folder):
    first = load("my_task_file.py:plain", _CONFIG)
    (folder / "my_task_file.py").write_text(_FILE.replace("seed_", "key_"))
    assert load("my_task_file.py:plain", _CONFIG) is not first
    assert list(load("my_task_file.py:with_config", _CONFIG).metrics) == ["key_5"]
    assert "task_my_task_file" not in sys.modules


def test_an_error_of_the_users_own_is_not_dressed_up():
    def broken():
        return {}["key"]

    with pytest.raises(KeyError):
        resolve(broken, _CONFIG)


def test_a_usage_error_of_the_task_stays_as_it_is():
    def refusing():
        raise UsageError("my data are gone")

    with pytest.raises(UsageError, match=r"^my data are gone$"):
        resolve(refusing, _CONFIG)


@pytest.mark.parametrize(("given", "kind"), [(Task, "type"), (keras.Sequential(), "Sequential")])
def test_what_makes_no_task_is_not_called(given, kind):
    with pytest.raises(UsageError, match=f"the task is a {kind}; it must be a dist_train.Task"):
        resolve(given, _CONFIG)


def test_resolve_takes_what_load_finds():
    task = _task()
    assert resolve(task, _CONFIG) is task
    assert resolve(lambda: task, _CONFIG) is task
    assert list(resolve(lambda c: _task(metrics={c.model: max}), _CONFIG).metrics) == ["mlp"]


@pytest.mark.parametrize("given", [_task, lambda: _task(), lambda config: _task()])
def test_settings_that_the_task_does_not_read_are_told_of(given, caplog):
    given = given() if given is _task else given  # a Task itself
    resolve(given, Config(model="cnn", augment_shift=2, epochs=7))
    told = "without an effect here: model='cnn', augment_shift=2; only a task that is a function"
    reads = callable(given) and given.__code__.co_argcount == 1
    assert (told in caplog.text) == (not reads)
    caplog.clear()
    resolve(given, Config(epochs=7))
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train": None}, "Task.train is a NoneType; use dist_train.Arrays"),
        ({"train": (np.zeros(4), np.zeros(4))}, "Task.train is a tuple"),
        ({"test": [1, 2]}, "Task.test is a list"),
        ({"validation": np.zeros(4)}, "Task.validation is a ndarray"),
        ({"validation": {"x": 1}}, "Task.validation is a dict"),
        ({"test": iter([1])}, "Task.test is a list_iterator"),
        ({"metrics": {"loss": max, "weight": max}}, "metrics may not be named loss, weight"),
        ({"model": None}, "Task.model is a NoneType; give a function"),
        ({"loss": None}, "Task.loss is None; use an object"),
        ({"loss": keras.losses.MeanSquaredError}, "Task.loss is <class .*; use an object, such as"),
        ({"model": keras.Sequential()}, "Task.model is a Sequential; give a function that makes"),
        ({"optimizer": keras.optimizers.SGD()}, "Task.optimizer is a SGD; give a function"),
        ({"optimizer": "sgd"}, "Task.optimizer is a str; give a function"),
        ({"metrics": ["accuracy"]}, "Task.metrics is a list; use {name: fn"),
        ({"metrics": {"a": "accuracy"}}, "Task.metrics: a is a str; use a function"),
        ({"metrics": {"a": keras.metrics.AUC()}}, "Task.metrics: a is a AUC; use a function"),
    ],
)
def test_a_task_that_cannot_train_is_an_error(changed, message):
    with pytest.raises(UsageError, match=message):
        _task(**changed)


def test_a_source_without_examples_is_an_error():
    class Empty:
        def __len__(self):
            return 0

        def __getitem__(self, indices):
            raise IndexError

    with pytest.raises(UsageError, match=r"Task.validation has no examples"):
        _task(validation=Empty())


def test_a_spec_of_a_file_names_it():
    assert str(source_file("a/b.py:task")) == "a/b.py"
    assert source_file("a.b:task") is None
    assert source_file("mnist") is None
