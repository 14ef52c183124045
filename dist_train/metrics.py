"""Metrics: exact sums become means; the log: console, metrics.jsonl, TensorBoard."""

import contextlib
import json
import os
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from absl import logging

from dist_train.errors import RunError
from dist_train.rows import Row, mean_names

# The share of the time that a line tells when the input takes it.
_SLOW = 0.1


def means(names: Sequence[str], sums: np.ndarray) -> dict[str, float]:
    """The exact means over examples.

    Args:
      names: of the sums; one of them is 'weight', the number of examples.
      sums: [len(names)] float64.
    """
    weight = float(sums[list(names).index("weight")])
    return {
        name: float(total) / weight if weight else float("nan")
        for name, total in zip(names, sums, strict=True)
        if name != "weight"
    }


class Tally:
    """The sums since the last line of the log, and the time that their steps took.

    Args:
      names: of the sums; see `means`.
      sums: [len(names)] float64 to go on from, whose time is not known; None: zeros.
    """

    def __init__(self, names: Sequence[str], sums: np.ndarray | None = None):
        self._names = names
        self.sums = np.zeros(len(names)) if sums is None else sums
        self._seconds = 0.0
        self._untimed = self._examples()

    def add(self, sums: np.ndarray, seconds: float) -> None:
        """Further steps."""
        self.sums = self.sums + sums
        self._seconds += seconds

    def means(self) -> dict[str, float]:
        """Over all examples."""
        return means(self._names, self.sums)

    def examples_per_second(self) -> float:
        """Of those whose time is known."""
        return (self._examples() - self._untimed) / max(self._seconds, 1e-9)

    def _examples(self) -> float:
        return float(self.sums[list(self._names).index("weight")])


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
    finite = {k: v if not isinstance(v, float) or np.isfinite(v) else None for k, v in row.items()}
    return json.dumps(finite) + "\n"


class _Forgiving:
    """A writer of records that goes silent, after a warning, when it cannot write any more."""

    def __init__(self, writer: Any, folder: Path):
        self._writer = writer
        self._folder = folder
        self._has_failed = False

    def write(self, data: bytes) -> None:
        self._attempt(lambda: self._writer.write(data))

    def flush(self) -> None:
        self._attempt(self._writer.flush)

    def close(self) -> None:
        self._attempt(self._writer.close)

    def _attempt(self, act: Callable[[], object]) -> None:
        import tensorflow as tf

        if self._has_failed:
            return
        try:
            act()
        except (OSError, tf.errors.OpError) as error:
            self._has_failed = True
            first = str(getattr(error, "message", error)).splitlines()[0]
            logging.warning("%s cannot be written any more: %s", self._folder, first)


class TensorBoard:
    """The numbers of each row as scalars named '<kind>/<metric>'.

    The tensorboard package's own writer: it has a thread, where tf.summary takes a millisecond of
    the training for each line of the log.
    """

    def __init__(self, folder: Path):
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        self._writer = EventFileWriter(str(folder))
        # Its thread would die of a full disk with a traceback; metrics.jsonl has the numbers too.
        queue = self._writer._async_writer
        queue._writer = queue._worker._record_writer = _Forgiving(queue._writer, folder)

    def write(self, row: Row) -> None:
        values = [
            self._summary.Value(tag=f"{row['kind']}/{name}", simple_value=value)
            for name, value in row.items()
            if isinstance(value, float) and name != "time"
        ]
        self._add(self._summary(value=values), row["step"], row["time"])

    def picture(self, tag: str, png: bytes, step: int, time: float) -> None:
        """A PNG for the Images tab."""
        image = self._summary.Image(encoded_image_string=png)
        # The size stands in the PNG's first chunk; TensorBoard wants it beside.
        image.width, image.height = struct.unpack(">II", png[16:24])
        image.colorspace = 4
        self._add(self._summary(value=[self._summary.Value(tag=tag, image=image)]), step, time)

    def settings(self, values: Mapping[str, Any], time: float) -> None:
        """The hyper-parameters, for the HParams tab."""
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb

        known = {name: value for name, value in values.items() if value is not None}
        self._add(hparams_pb(known, trial_id="run", start_time_secs=time), 0, time)

    def _add(self, summary: Any, step: int, time: float) -> None:
        self._writer.add_event(self._event(wall_time=time, step=step, summary=summary))

    def close(self) -> None:
        self._writer.close()


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
