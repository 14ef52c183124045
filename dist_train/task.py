"""Task: what a user supplies, and how a name on the command line becomes one."""

import dataclasses
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import logging

from dist_train.errors import DistTrainError, UsageError
from dist_train.examples import Source
from dist_train.rows import FACTS

if TYPE_CHECKING:
    import keras

    from dist_train.config import Config

_BUILT_IN = {"mnist": "dist_train.mnist:task"}
# The step's own sums, and what else a row of the log has.
_RESERVED = {"loss", "weight", *FACTS}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A model, its examples and its loss.

    Attributes:
      model: () -> keras.Model, called in the strategy's scope. Losses that its layers add are taken
        as means over their batch.
      train: the examples to learn from: Arrays, a Dataset, or anything that is a Source.
      validation: evaluated every `eval_epochs` epochs, or None.
      test: evaluated once at the end, or None.
      loss: a keras.losses.Loss (its reduction is not used: the exact mean over the global batch
        is), a Keras loss by name, or fn(y, outputs) -> [batch] float losses.
      metrics: {name: fn(y, outputs) -> [batch] float}; the exact mean over examples is reported.
      optimizer: () -> keras.Optimizer, called in the strategy's scope; default: from the flags.
      preprocess: fn(x, y, seed) -> (x, y), traced, on the device, over some examples of a batch,
        of which it must take each by itself. `seed` is [batch, 2] int32, a function of (seed,
        epoch, example index), for the tf.random.stateless_* and tf.image.stateless_* functions; in
        evaluation it is None: no augmentation there.
    """

    model: "Callable[[], keras.Model]"
    train: Source
    validation: Source | None = None
    test: Source | None = None
    loss: "keras.losses.Loss | str | Callable[[Any, Any], Any]"
    metrics: Mapping[str, Callable[[Any, Any], Any]] = dataclasses.field(default_factory=dict)
    optimizer: "Callable[[], keras.optimizers.Optimizer] | None" = None
    preprocess: Callable[[Any, Any, Any], tuple[Any, Any]] | None = None

    def __post_init__(self) -> None:
        for name in ("train", "validation", "test"):
            source = getattr(self, name)
            if source is None and name != "train":
                continue
            containers = (list, tuple, dict, str, bytes, np.ndarray)  # indexable, but no Source
            if not isinstance(source, Source) or isinstance(source, containers):
                raise UsageError(
                    f"Task.{name} is a {type(source).__name__}; use dist_train.Arrays(x, y),"
                    " dist_train.Dataset(make, examples=N), or an object with __len__ and"
                    " __getitem__(indices) -> (x, y)"
                )
            if len(source) == 0:
                raise UsageError(f"Task.{name} has no examples")
        self._check_functions()

    def _check_functions(self) -> None:
        """What `model.compile` takes is made already, or is a name, or keeps a state of its own."""
        for name in ("model", "optimizer"):
            given = getattr(self, name)
            # A model can be called too, but not for a model.
            made = hasattr(given, "variables") and not isinstance(given, type)
            if (given is not None or name == "model") and (made or not callable(given)):
                raise UsageError(
                    f"Task.{name} is a {type(given).__name__}; give a function that makes it, to be"
                    " called in the strategy's scope"
                )
        if isinstance(self.loss, type) or not (callable(self.loss) or isinstance(self.loss, str)):
            raise UsageError(
                f"Task.loss is {self.loss!r}; use an object, such as"
                " keras.losses.MeanSquaredError(), its name, or fn(y, outputs) -> [batch]"
            )
        if not isinstance(self.metrics, Mapping):
            raise UsageError(
                f"Task.metrics is a {type(self.metrics).__name__}; use"
                " {name: fn(y, outputs) -> [batch]}"
            )
        for name, given in self.metrics.items():
            if not callable(given) or hasattr(given, "update_state"):
                raise UsageError(
                    f"Task.metrics: {name} is a {type(given).__name__}; use a function (y, outputs)"
                    " -> [batch], such as keras.metrics.sparse_categorical_accuracy"
                )
        if taken := _RESERVED & set(self.metrics):
            raise UsageError(f"metrics may not be named {', '.join(sorted(taken))}")


def load(spec: str, config: "Config") -> Task:
    """The Task that `spec` names.

    Args:
      spec: a built-in name, 'package.module:name' or 'path/file.py:name', where name is a Task or
        a function that returns one; the function may take the Config as its only argument.
      config: handed to such a function.

    Raises:
      UsageError: no such module, file or name, or it gives no Task.
    """
    module_name, name = _parts(spec)
    module = _import(module_name)
    try:
        found = getattr(module, name)
    except AttributeError:
        raise UsageError(f"task={spec!r}: {module_name} has no {name!r}") from None
    return resolve(found, config)


def check(config: "Config") -> None:
    """Finds what can be wrong with config.task before TensorFlow starts, without an import.

    Raises:
      UsageError: it is not of the form that `load` takes, or a file or folder is missing.
    """
    _parts(config.task)
    path = source_file(config.task)
    if path is not None and not path.is_file():
        raise UsageError(f"task file {path} does not exist")
    folder = config.data_dir if config.task in _BUILT_IN else None
    if folder is not None and not Path(folder).exists():
        raise UsageError(f"data_dir={folder} does not exist")


def _parts(spec: str) -> tuple[str, str]:
    """(module or file, name) of a spec."""
    module_name, separator, name = _BUILT_IN.get(spec, spec).rpartition(":")
    if not separator or not module_name or not name:
        raise UsageError(
            f"task={spec!r} is neither {', '.join(_BUILT_IN)} nor of the form"
            " 'package.module:name' or 'path/file.py:name'"
        )
    return module_name, name


def resolve(found: Any, config: "Config") -> Task:
    """The Task itself, from a Task or a function that returns one (and may take the Config)."""
    # A class or a model can be called, but not for a task.
    made = isinstance(found, Task | type) or hasattr(found, "variables")
    called = not made and callable(found)
    takes_config = called and _takes_config(found)
    if called:
        try:
            found = found(config) if takes_config else found()
        except DistTrainError:
            raise
        except OSError as error:  # a missing or unreadable data file, most of the time
            raise UsageError(f"the task could not be made: {error}") from error
    if not isinstance(found, Task):
        raise UsageError(f"the task is a {type(found).__name__}; it must be a dist_train.Task")
    unused = [
        f"{field.name}={value!r}"
        for field in dataclasses.fields(config)
        if field.metadata["of_task"] and (value := getattr(config, field.name)) != field.default
    ]
    if unused and not takes_config:
        logging.warning(
            "without an effect here: %s; only a task that is a function of the config reads it",
            ", ".join(unused),
        )
    return found


def _takes_config(function: Any) -> bool:
    """Whether its first parameter is named config, or must be given."""
    first = next(iter(inspect.signature(function).parameters.values()), None)
    return first is not None and (first.name == "config" or first.default is first.empty)


def source_file(spec: str) -> Path | None:
    """The file that a 'path/file.py:name' spec names, or None for the other forms."""
    module_name = spec.rpartition(":")[0]
    return Path(module_name) if module_name.endswith(".py") else None


def _import(module_name: str):
    try:
        if not module_name.endswith(".py"):
            if "" not in sys.path:  # a console script's path lacks the current folder
                sys.path.insert(0, "")
            if module_name.startswith("."):
                raise UsageError(f"task module {module_name} is relative; name it from its root")
            return importlib.import_module(module_name)
        path = Path(module_name)
        name = path.stem
        if (folder := str(path.parent.absolute())) not in sys.path:  # as of a script
            sys.path.insert(0, folder)
        taken = name in sys.stdlib_module_names or name in sys.modules
        if taken and getattr(sys.modules.get(name), "__file__", None) != str(path.absolute()):
            name = f"task_{name}"  # never in the place of a module that others import
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None or not path.is_file():
            raise UsageError(f"task file {module_name} does not exist")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # so that classes defined in it can be serialized
        spec.loader.exec_module(module)
        return module
    except ImportError as error:
        raise UsageError(f"task module {module_name} cannot be imported: {error}") from error
    except SyntaxError as error:
        raise UsageError(f"task {error.filename}, line {error.lineno}: {error.msg}") from error
