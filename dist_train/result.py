"""Result: what a run ended with."""

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import keras

Means = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run ended with.

    Attributes:
      metrics: {"train" | "validation" | "test": {"loss": …, "accuracy": …}}, exact means; train is
        over the steps of the last line of the log.
      model: the trained model; where --ema is set, its averaged weights are in the exports.
      step: how many steps were done in all.
      workdir: the folder; None on workers other than the chief.
    """

    metrics: dict[str, Means]
    model: "keras.Model"
    step: int
    workdir: str | None
