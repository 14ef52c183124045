"""TensorBoard: the numbers and pictures of a run, as its files of events."""

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
