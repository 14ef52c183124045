"""Packages that another one imports without a use for them: each is imported when first used."""

import contextlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from typing import Any


class _Deferred(types.ModuleType):
    """Stands for a module that is imported when something of it is asked for."""

    def __getattr__(self, name: str) -> Any:
        if name == "__path__":  # every `from package import ...` looks whether there is one
            return _Path(self.__name__)
        if name == "__file__" and sys.modules.get(self.__name__) is self:  # inspect asks all
            raise AttributeError(name)
        return getattr(_import(self.__name__), name)


class _Path:
    """A package's `__path__`, gone through only where another submodule of it is imported."""

    def __init__(self, package: str):
        self._package = package

    def __iter__(self) -> Iterator[str]:
        return iter(_import(self._package).__path__)


def _import(name: str) -> types.ModuleType:
    _withdraw()
    return importlib.import_module(name)


@contextlib.contextmanager
def deferred(package: str, *submodules: str) -> Iterator[None]:
    """What the body imports of a package is a stand-in, which imports the package at its first use.

    From then on it hands on what is asked of it. Nothing happens if the package was imported
    before; afterwards every import is the real one.

    Args:
      package: name of a top-level package, installed or not.
      submodules: names of its modules that are imported in the body; all of them.
    """
    if package in sys.modules or (spec := importlib.util.find_spec(package)) is None:
        yield
        return
    top = sys.modules[package] = _Deferred(package)
    top.__spec__ = spec  # for those who only look whether it is there
    for name in submodules:
        module = sys.modules[f"{package}.{name}"] = _Deferred(f"{package}.{name}")
        setattr(top, name, module)
    try:
        yield
    finally:
        _withdraw()


def _withdraw() -> None:
    for name, module in list(sys.modules.items()):  # another thread may import meanwhile
        if type(module) is _Deferred:
            sys.modules.pop(name, None)
