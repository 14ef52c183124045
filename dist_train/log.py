"""Log: what a run reports while it trains: console, metrics.jsonl, TensorBoard."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import logging

from dist_train.rows import MetricsFile, Row, mean_names
from dist_train.tensorboard import TensorBoard

# The share of the time that a line tells when the input takes it.
_SLOW = 0.1


class Console:
    """Lines through absl's logging and, on a terminal, a bar below them."""

    def __init__(self, *, total_steps: int = 0, step: int = 0, bar: bool = False):
        self._bar = None
        if bar:
            from tqdm import tqdm

            self._bar = tqdm(
                total=total_steps, initial=step, unit="step", dynamic_ncols=True, leave=False
            )

    def advance(self, steps: int) -> None:
        if self._bar is not None:
            self._bar.update(steps)

    def line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.clear()
        logging.info("%s", text)
        if self._bar is not None:
            self._bar.refresh()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class RunLog:
    """Everything that a run reports while it trains.

    Args:
      file, board, console: where to; each may be missing, as on workers other than the chief.
      clock: seconds since the epoch.
    """

    def __init__(
        self,
        file: MetricsFile | None = None,
        board: TensorBoard | None = None,
        console: Console | None = None,
        clock: Callable[[], float] = time.time,
    ):
        self._file = file
        self._board = board
        self._console = console
        self._clock = clock

    @classmethod
    @contextlib.contextmanager
    def opened(
        cls, metrics: Path, tensorboard: Path, *, step: int, total_steps: int, progress: str
    ) -> "Iterator[RunLog]":
        """The chief's log, closed in the end.

        Args:
          metrics, tensorboard: the file and the folder.
          step: the run begins after it.
          total_steps: of the whole run, for the bar.
          progress: auto (a bar on a terminal), true or false.
        """
        bar = progress == "true" or (progress == "auto" and sys.stderr.isatty())
        with (
            contextlib.closing(MetricsFile(metrics, resumed_step=step)) as file,
            contextlib.closing(TensorBoard(tensorboard)) as board,
            contextlib.closing(Console(total_steps=total_steps, step=step, bar=bar)) as console,
        ):
            yield cls(file, board, console)

    def train(
        self,
        row: Row,
        also: Mapping[str, float] | None = None,
        *,
        waiting: float = 0.0,
        ago_s: float = 0.0,
    ) -> None:
        """A line of training: means since the line before, and the last batch's own loss.

        Args:
          also: further numbers, for TensorBoard alone.
          waiting: the share of the time in which the input had nothing; the line tells if it is
            one that matters.
          ago_s: how many seconds ago the line was due.
        """
        self._write("train", row, also, ago_s)
        slow = f", {100 * waiting:.0f} % of the time waiting for input"
        self._line(
            f"epoch {row['epoch']}  step {row['step']:,}  batch loss {row['batch_loss']:.4f}"
            f"  {_shown(row)}  seen {row['examples']:,} examples"
            f"  {row['examples_per_second']:,.0f} examples/s{slow if waiting >= _SLOW else ''}"
        )

    def evaluation(self, kind: str, row: Row) -> None:
        """A line of `kind` validation or test: means over all of its examples."""
        self._write(kind, row)
        self._line(f"epoch {row['epoch']}  step {row['step']:,}  {kind}: {_shown(row)}")

    def settings(self, values: Mapping[str, Any]) -> None:
        """The hyper-parameters of the run, for TensorBoard."""
        if self._board is not None:
            self._board.settings(values, self._clock())

    def picture(self, tag: str, png: bytes, step: int) -> None:
        """A picture, for TensorBoard."""
        if self._board is not None:
            self._board.picture(tag, png, step, self._clock())

    def advance(self, steps: int) -> None:
        """Moves the bar."""
        if self._console is not None:
            self._console.advance(steps)

    def sync(self) -> None:
        """Waits until all rows are on the disk; a checkpoint relies on them."""
        if self._file is not None:
            self._file.sync()

    def _write(
        self, kind: str, row: Row, also: Mapping[str, float] | None = None, ago_s: float = 0.0
    ) -> None:
        row = {"kind": kind, **row, "time": self._clock() - ago_s}
        if self._file is not None:
            self._file.write(row)
        if self._board is not None:
            self._board.write({**row, **(also or {})})

    def _line(self, text: str) -> None:
        if self._console is not None:
            self._console.line(text)


def _shown(row: Row) -> str:
    return "  ".join(f"{name} {row[name]:.4f}" for name in mean_names(row))
