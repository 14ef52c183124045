"""Curves: a picture of a run's loss and metrics over its steps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

_STYLES = {
    "train": {"color": "tab:blue", "linewidth": 1.0},
    "validation": {"color": "tab:orange", "marker": "o", "markersize": 3.5},
    "test": {"color": "tab:green", "marker": "*", "markersize": 10, "linestyle": "none"},
}


def draw(rows: Sequence[dict[str, Any]], names: Sequence[str], path: Path) -> None:
    """Writes a PNG with a panel for each of the means.

    Args:
      rows: of metrics.jsonl.
      names: of the means.
      path: the file, written whole or not at all.
    """
    # Only here: matplotlib takes half a second to import. The Figure itself, not pyplot, which
    # would look for a screen.
    from matplotlib.figure import Figure

    width, height = 5.2 * len(names), 3.6
    figure = Figure(figsize=(width, height))
    # Margins in inches: a layout engine would draw all twice to find them.
    figure.subplots_adjust(
        left=0.75 / width, right=1.0 - 0.1 / width, bottom=0.5 / height, top=1.0 - 0.35 / height,
        wspace=0.85 / 4.35,
    )  # fmt: skip
    for name, axes in zip(names, figure.subplots(1, len(names), squeeze=False)[0], strict=True):
        for kind, style in _STYLES.items():
            mine = (row for row in rows if row["kind"] == kind)
            points = [(r["step"], r[name]) for r in mine if r.get(name) is not None]
            if points:
                steps, values = zip(*points, strict=True)
                axes.plot(steps, values, label=f"{kind} {values[-1]:.4g}", **style)
        axes.set(xlabel="step", title=name)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    partial = path.with_suffix(".partial.png")
    figure.savefig(partial, dpi=110)
    partial.replace(path)
