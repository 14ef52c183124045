"""Rows: the objects of metrics.jsonl, and the file."""

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from dist_train.errors import RunError

Row = dict[str, Any]
# What a row has besides the means of the loss and the metrics.
FACTS = frozenset({
    "kind", "step", "epoch", "examples", "time",
    "batch_loss", "gradient_norm", "examples_per_second",
})  # fmt: skip


def mean_names(row: Row) -> list[str]:
    """The names of a row's means: the loss, and the task's metrics."""
    return [name for name in row if name not in FACTS]


def read_rows(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl; a torn last line, which a crash leaves, is passed over."""
    rows = []
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_text(errors="replace").splitlines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict) and type(row.get("step")) is int and "kind" in row:
                rows.append(row)
    return rows


class MetricsFile:
    """metrics.jsonl: one JSON object a line, each step once."""

    def __init__(self, path: Path, *, resumed_step: int):
        """Keeps what the checkpoint of `resumed_step` has seen; what came later is done again."""
        self._path = path
        rows = [
            row for row in read_rows(path) if row["step"] <= resumed_step and row["kind"] != "test"
        ]
        partial = path.with_suffix(".partial")
        with self._explained():
            with partial.open("w") as file:
                file.writelines(_line(row) for row in rows)
            partial.replace(path)
            self._file: TextIO = path.open("a")

    def write(self, row: Row) -> None:
        """Appends a row; it is in the file when this returns.

        Raises:
          RunError: it cannot be written; a torn last line is passed over by `read_rows`.
        """
        with self._explained():
            self._file.write(_line(row))
            self._file.flush()

    def sync(self) -> None:
        """Waits until all rows are on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        with contextlib.suppress(OSError):  # `write` has raised what it could not write
            self._file.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"{self._path} cannot be written ({error.strerror}); the checkpoints are intact:"
                " start again when it can"
            ) from error


def _line(row: Row) -> str:
    """JSON has no word for what is not finite."""
    finite = {
        k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in row.items()
    }
    return json.dumps(finite) + "\n"
