"""Rows: what an object of metrics.jsonl has besides the means of the loss and the metrics."""

from typing import Any

Row = dict[str, Any]
FACTS = frozenset({
    "kind", "step", "epoch", "examples", "time",
    "batch_loss", "gradient_norm", "examples_per_second",
})  # fmt: skip


def mean_names(row: Row) -> list[str]:
    """The names of a row's means: the loss, and the task's metrics."""
    return [name for name in row if name not in FACTS]
