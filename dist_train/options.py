"""Options: the command's flags, made from the settings; its help; what it says of unknown ones."""

import dataclasses
import difflib
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from dist_train.config import Config
from dist_train.errors import UsageError
from dist_train.settings import kind_of

# What --help shows; --helpfull shows all.
_GROUPS = {
    "What to train": ("recipe", "task", "model", "data_dir", "validation_size"),
    "How": ("batch_size", "epochs", "optimizer", "learning_rate", "lr_schedule", "seed", "dtype"),
    "Where": ("strategy", "devices"),
    "The run": ("workdir", "log_steps", "eval_epochs", "checkpoint_steps"),
    "Afterwards": ("mode", "checkpoint", "predict_on", "output", "compare"),
}
_COMPARE = (
    "Instead of a run: compare those in these workdirs, --compare runs/a runs/b; a table, and"
    " a picture in compare.png or --output. Default: none."
)
# Python's words for a value that cannot be parsed, and ours.
_PLAINER = {
    r"invalid literal for int\(\)": "not an integer",
    "could not convert string to float": "not a number",
    r"\('Non-boolean argument": "neither true nor false",
}
_RECIPE = (
    "Flags for a known result, from a file inside the package; those of the command line win over"
    " them. Default: none."
)
_RECIPES = {file.stem: file for file in Path(__file__).with_name("recipes").glob("*.flags")}
_WIDTH = 98


def define_flags(flag_values: flags.FlagValues) -> None:
    """Defines a flag per field of Config, with its default, help, bounds; --recipe, --compare."""
    for field in dataclasses.fields(Config):
        kind, _ = kind_of(field)
        name, meta, default = field.name, field.metadata, field.default
        define: Any
        options: dict[str, Any] = {"flag_values": flag_values}
        if name == "steps_per_loop":  # the only number that has a word as its default
            define, default = flags.DEFINE_string, "auto"
        elif meta["choices"]:
            define = flags.DEFINE_enum
            spelled = ("multi-worker",) if name == "strategy" else ()
            options["enum_values"] = [*meta["choices"], *spelled]
        elif kind in (int, float):
            define = flags.DEFINE_integer if kind is int else flags.DEFINE_float
            options |= {"lower_bound": meta["lower"], "upper_bound": meta["upper"]}
        else:
            define = flags.DEFINE_bool if kind is bool else flags.DEFINE_string
        define(name=name, default=default, help=meta["help"], **options)
    flags.DEFINE_enum("recipe", None, sorted(_RECIPES), _RECIPE, flag_values=flag_values)
    flags.DEFINE_string("compare", None, _COMPARE, flag_values=flag_values)


def parse(flag_values: flags.FlagValues, argv: Sequence[str]) -> list[str]:
    """Parses a command with its recipe, if it names one; returns what stands beside the flags.

    Raises:
      flags.Error: a flag is unknown, or its value is not allowed.
    """
    rest = flag_values(argv)
    if flag_values.recipe is not None:  # of a flag that comes twice the last one holds
        file = f"--flagfile={_RECIPES[flag_values.recipe]}"
        rest = flag_values([argv[0], file, *argv[1:]])
    return rest


def recipe(name: str, **settings: Any) -> Config:
    """The Config of `dist-train --recipe=NAME`, with some settings in the place of its own.

    Raises:
      UsageError: there is no recipe of that name, or a setting is out of bounds.
    """
    values = flags.FlagValues()
    define_flags(values)
    try:
        parse(values, ["dist-train", f"--recipe={name}"])
    except flags.Error as error:
        raise UsageError(explain(error, values)) from None
    return dataclasses.replace(from_flags(values), **settings)


def define_help(flag_values: flags.FlagValues) -> None:
    """Defines --help, with the main flags in groups, and --helpfull."""
    app.define_help_flags()
    flags.DEFINE_flag(_Help(flag_values), flag_values)


class _Help(app.HelpFlag):
    """absl's lists the flags of a module in the order of the alphabet."""

    def __init__(self, flag_values: flags.FlagValues):
        super().__init__()
        self.allow_override = True
        self._flag_values = flag_values

    def parse(self, arg: Any) -> None:
        if self._parse(arg):
            print(help_text(self._flag_values))
            sys.exit(0)


def help_text(flag_values: flags.FlagValues) -> str:
    """The answer to --help."""
    lines = [
        "usage: dist-train [--name=value …]",
        "",
        "Trains a TensorFlow model: the same numbers on one device, on many and on a cluster.",
    ]
    for title, names in _GROUPS.items():
        lines += ["", title]
        for name in names:
            flag = flag_values[name]
            default = "" if flag.default is None else f"={flag.default}"
            text = f"--{name}{default}  {flag.help}"
            lines += textwrap.wrap(text, _WIDTH, initial_indent="  ", subsequent_indent="      ")
    lines += ["", "--helpfull lists all flags; --flagfile=FILE reads them from a file."]
    return "\n".join(lines)


def explain(error: flags.Error, flag_values: flags.FlagValues) -> str:
    """One line about flags that cannot be parsed, with the nearest name for an unknown one."""
    if not isinstance(error, flags.UnrecognizedFlagError):
        text = str(error).removeprefix("ERROR:: ")
        for theirs, ours in _PLAINER.items():
            text = re.sub(f": {theirs}.*", f": {ours}", text)
        return text
    name = error.flagname
    negated = name.startswith("no")
    near = difflib.get_close_matches(name, list(flag_values), n=1)
    if not near and negated:
        near = [f"no{each}" for each in difflib.get_close_matches(name[2:], list(flag_values), n=1)]
    remedy = f"did you mean --{near[0]}?" if near else "--helpfull lists all"
    return f"unknown flag --{name}; {remedy}"


def from_flags(
    flag_values: flags.FlagValues,
    arguments: list[str] | None = None,
    saved: Mapping[str, Any] | None = None,
) -> Config:
    """The Config that parsed flags describe.

    Args:
      flag_values: parsed.
      arguments: what stands beside the flags: further files to predict on.
      saved: the settings of a run, of which those that make the model and its examples are taken
        for flags that are not given.

    Raises:
      UsageError: a value is out of bounds, or two contradict each other.
    """
    values: dict[str, Any] = {
        field.name: flag_values[field.name].value for field in dataclasses.fields(Config)
    }
    text = values["steps_per_loop"]
    if text == "auto":
        values["steps_per_loop"] = None
    else:
        try:
            values["steps_per_loop"] = int(text)
        except ValueError:
            raise UsageError(
                f"steps_per_loop={text!r} is neither auto nor a number of steps"
            ) from None
    if arguments and values["mode"] == "predict":
        values["predict_on"] = ",".join([values["predict_on"] or "", *arguments])
    elif arguments:
        raise UsageError(f"unexpected argument {arguments[0]!r}; flags are written --name=value")
    saved = saved or {}
    for field in dataclasses.fields(Config):
        name, meta = field.name, field.metadata
        makes = meta["trajectory"] or meta["of_task"] or name == "epochs"
        if makes and name in saved and not flag_values[name].present:
            values[name] = saved[name]
    return Config(**values)
