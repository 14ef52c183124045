"""Comparison: several runs side by side, from what their workdirs hold; without TensorFlow."""

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_train import workdir
from dist_train.errors import RunError, UsageError
from dist_train.rows import Row, mean_names, read_rows

_NOT_COMPARED = {"workdir"}


@dataclasses.dataclass(frozen=True)
class Run:
    """What is known of a run.

    Attributes:
      name: its workdir.
      settings: of its last start.
      rows: of its metrics.jsonl.
    """

    name: str
    settings: dict[str, Any]
    rows: list[Row]

    @classmethod
    def read(cls, folder: str) -> "Run":
        """Raises UsageError if there is no run, or nothing was logged yet."""
        place = workdir.Workdir(Path(folder))
        if not place.config.is_file():
            raise UsageError(f"compare={folder} is no workdir of a run: it has no config.json")
        rows = read_rows(place.metrics)
        if not rows:
            raise UsageError(f"compare={folder} has no rows in metrics.jsonl yet; wait for some")
        return cls(folder, workdir.saved_settings(folder), rows)

    def last(self, kind: str) -> Row:
        """The newest row of a kind, or {}."""
        return next((row for row in reversed(self.rows) if row["kind"] == kind), {})

    @property
    def names(self) -> list[str]:
        """The metrics, the loss first."""
        found = dict.fromkeys(name for row in self.rows for name in mean_names(row))
        return sorted(found, key=lambda name: name != "loss")


def table(runs: Sequence[Run]) -> str:
    """Lines for a terminal: a row for each run, then the settings that differ."""
    names = list(dict.fromkeys(name for run in runs for name in run.names))
    kinds = ("train", "validation", "test")
    columns = [
        (kind, name) for kind in kinds for name in names if any(name in r.last(kind) for r in runs)
    ]
    head = ["run", "step", *(f"{kind} {name}" for kind, name in columns), "examples/s"]
    body = []
    for run in runs:
        rates = [row["examples_per_second"] for row in run.rows if row.get("examples_per_second")]
        body.append(
            [
                run.name,
                f"{max(row['step'] for row in run.rows):,}",
                *(_number(run.last(kind).get(name)) for kind, name in columns),
                f"{statistics.median(rates):,.0f}" if rates else "–",
            ]
        )
    return "\n".join([*_aligned([head, *body]), *_different(runs)])


def draw(runs: Sequence[Run], path: Path) -> None:
    """Writes a PNG with a panel for the loss and each metric, and a colour for each run.

    Raises:
      RunError: the file cannot be written.
    """
    from matplotlib.figure import Figure  # takes half a second to import

    names = list(dict.fromkeys(name for run in runs for name in run.names))
    figure = Figure(figsize=(5.6 * len(names), 4.2), layout="constrained")
    styles: dict[str, dict[str, Any]] = {
        "train": {"linewidth": 0.9, "alpha": 0.6},
        "validation": {"marker": "o", "markersize": 3.5},
        "test": {"marker": "*", "markersize": 10, "linestyle": "none"},
    }
    for name, axes in zip(names, figure.subplots(1, len(names), squeeze=False)[0], strict=True):
        for number, run in enumerate(runs):
            for kind, style in styles.items():
                mine = (row for row in run.rows if row["kind"] == kind)
                points = [(row["step"], row[name]) for row in mine if row.get(name) is not None]
                if points:
                    steps, values = zip(*points, strict=True)
                    label = f"{run.name} {kind} {values[-1]:.4g}"
                    axes.plot(steps, values, color=f"C{number % 10}", label=label, **style)
        axes.set(xlabel="step", title=name)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
    try:
        figure.savefig(path, format="png", dpi=110)
    except OSError as error:
        raise RunError(f"output={path} cannot be written: {error.strerror}") from error


def _different(runs: Sequence[Run]) -> list[str]:
    names = dict.fromkeys(name for run in runs for name in run.settings)
    rows = [
        [name, *(_said(run.settings.get(name)) for run in runs)]
        for name in names
        if name not in _NOT_COMPARED and len({repr(run.settings.get(name)) for run in runs}) > 1
    ]
    if not rows:
        return ["", "all settings are the same"]
    return ["", *_aligned([["setting", *(run.name for run in runs)], *rows])]


def _said(value: Any) -> str:
    return "–" if value is None else str(value)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
