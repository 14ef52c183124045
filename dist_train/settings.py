"""Settings: the type and bounds of a field of Config, values that keep to them, differences."""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from dist_train.errors import UsageError

_MAX_FLOAT = 2**1023


def converted(field: dataclasses.Field, value: Any) -> Any:
    """The value in the field's type, or UsageError with value, constraint and remedy."""
    name, meta = field.name, field.metadata
    kind, optional = kind_of(field)
    if name == "strategy" and value == "multi-worker":
        value = "multi_worker"
    if kind is str and isinstance(value, bool) and "true" in meta["choices"]:
        value = str(value).lower()
    if value is None:
        if optional:
            return None
        raise UsageError(f"{name} is missing; give a {kind.__name__}")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < _MAX_FLOAT else math.inf
    if type(value) is not kind:
        raise UsageError(f"{name}={value!r} is a {type(value).__name__}; use a {kind.__name__}")
    if meta["choices"] and value not in meta["choices"]:
        raise UsageError(f"{name}={value!r} is not one of {', '.join(meta['choices'])}")
    lower, upper = meta["lower"], meta["upper"]
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{name}={value} is not a finite number")
    if lower is not None and value < lower:
        raise UsageError(f"{name}={value} is below {lower}; use {lower} or more")
    if upper is not None and value > upper:
        raise UsageError(f"{name}={value} is above {upper}; use {upper} or less")
    return value


def kind_of(field: dataclasses.Field) -> tuple[type, bool]:
    """(type, may it be None) of a field annotated `T` or `T | None`."""
    if isinstance(field.type, types.UnionType):
        (kind,) = (arg for arg in typing.get_args(field.type) if arg is not types.NoneType)
        return kind, True
    assert isinstance(field.type, type)
    return field.type, False


def differences(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{name: (mine, theirs)} where the two differ; a missing name counts as None."""
    names = {**mine, **theirs}
    return {
        name: (mine.get(name), theirs.get(name))
        for name in names
        if mine.get(name) != theirs.get(name)
    }
