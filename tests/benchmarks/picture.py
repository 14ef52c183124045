"""The tables of `training.py` as bars."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

_INCHES = 0.28  # per bar
_OURS, _THEIRS, _MET, _MISSED = "#1f77b4", "#b0b0b0", "#2ca02c", "#d62728"


@dataclasses.dataclass(frozen=True)
class Bar:
    """One contender.

    Attributes:
      label: of the bar.
      value: steps per second.
      times: how many times as fast ours is, or as one of ours is; or None.
      goal: for `times`, or None.
      ours: whether it is ours.
    """

    label: str
    value: float
    times: float | None
    goal: float | None
    ours: bool


def draw(panels: Mapping[str, Sequence[Bar]], path: Path) -> None:
    """Writes one picture with a panel per title; behind each bar its rate, ratio and goal."""
    heights = [len(bars) + 2 for bars in panels.values()]
    figure, axes = pyplot.subplots(
        len(panels),
        figsize=(11, _INCHES * sum(heights)),
        height_ratios=heights,
        layout="constrained",
        squeeze=False,
    )
    for axis, (title, bars) in zip(axes[:, 0], panels.items(), strict=True):
        places = range(len(bars))
        axis.barh(
            places,
            [bar.value for bar in bars],
            color=[_OURS if bar.ours else _THEIRS for bar in bars],
        )
        for place, bar in zip(places, bars, strict=True):
            text, color = f" {bar.value:,.0f}", "black"
            if bar.times is not None:
                text += f"   {bar.times:.2f} ×"
            if bar.times is not None and bar.goal is not None:
                text += f"  (goal {bar.goal:g} ×)"
                color = _MET if bar.times >= bar.goal else _MISSED
            axis.text(bar.value, place, text, va="center", fontsize=8, color=color)
        axis.set_yticks(places, [bar.label for bar in bars], fontsize=8)
        axis.invert_yaxis()
        # Logarithmic: from the eager loop to a floor it is a factor of a thousand.
        axis.set_xscale("log")
        axis.set_xlim(right=8 * max(bar.value for bar in bars))
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xlabel("steps/s; how many times as fast dist_train is", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
