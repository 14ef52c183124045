"""TensorBoard: the numbers and pictures of a run, as its files of events."""

import functools
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from absl import logging

from dist_train.rows import Row


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
            _warn(self._folder, "any more", error)


def _warn(folder: Path, when: str, error: Exception) -> None:
    first = str(getattr(error, "message", error)).splitlines()[0]
    logging.warning("%s cannot be written %s: %s", folder, when, first)


class TensorBoard:
    """The numbers of each row as scalars named '<kind>/<metric>'.

    The tensorboard package's own writer: it has a thread, where tf.summary takes a millisecond of
    the training for each line of the log. It is imported for the first row, not before the first
    step.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._settings: tuple[dict[str, Any], float] | None = None

    @functools.cached_property
    def _writer(self) -> Any:
        """None, after a warning, if there can be none."""
        import tensorflow as tf
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        try:
            writer = EventFileWriter(str(self._folder))
        except (OSError, tf.errors.OpError) as error:
            _warn(self._folder, "at all", error)
            return None
        # Its thread would die of a full disk with a traceback; metrics.jsonl has the numbers too.
        queue = writer._async_writer
        queue._writer = queue._worker._record_writer = _Forgiving(queue._writer, self._folder)
        return writer

    def write(self, row: Row) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [
            Summary.Value(tag=f"{row['kind']}/{name}", simple_value=value)
            for name, value in row.items()
            if isinstance(value, float) and name != "time"
        ]
        self._add(Summary(value=values), row["step"], row["time"])

    def picture(self, tag: str, png: bytes, step: int, time: float) -> None:
        """A PNG for the Images tab."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        image = Summary.Image(encoded_image_string=png)
        # The size stands in the PNG's first chunk; TensorBoard wants it beside.
        image.width, image.height = struct.unpack(">II", png[16:24])
        image.colorspace = 4
        self._add(Summary(value=[Summary.Value(tag=tag, image=image)]), step, time)

    def settings(self, values: Mapping[str, Any], time: float) -> None:
        """The hyper-parameters, for the HParams tab; written with the first row or picture."""
        known = {name: value for name, value in values.items() if value is not None}
        self._settings = known, time

    def _add(self, summary: Any, step: int, time: float) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        if self._settings is not None:
            from tensorboard.plugins.hparams.summary_v2 import hparams_pb

            known, start = self._settings
            self._settings = None
            self._add(hparams_pb(known, trial_id="run", start_time_secs=start), 0, start)
        if self._writer is not None:
            self._writer.add_event(Event(wall_time=time, step=step, summary=summary))

    def close(self) -> None:
        if vars(self).get("_writer") is not None:
            self._writer.close()
