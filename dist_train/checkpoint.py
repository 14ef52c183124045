"""Checkpoints: the whole state of a run, written whole or not at all, verified when read.

Each is a folder `step-00000782/` in TensorFlow's object-based format (a CRC per tensor), written
under another name, synced to the disk and then renamed: a reader or a crash sees all of it or
nothing. Only the chief writes and reads; the other workers get the state from it, so no shared
filesystem is needed.
"""

import contextlib
import os
import re
import shutil
from pathlib import Path

import tensorflow as tf
from absl import logging

from dist_train.errors import RunError, UsageError

_NAME = re.compile(r"step-(\d{8,})")
_FILE = "state"


class Checkpoints:
    """The checkpoints of one run.

    Args:
      folder: where they are; made at the first save.
      state: what they hold.
      keep: how many of the newest are kept.
    """

    def __init__(self, folder: Path, state: tf.train.Checkpoint, *, keep: int):
        self._folder = folder
        self._state = state
        self._keep = keep
        self._damaged: set[int] = set()  # steps that `restore` has skipped

    def steps(self) -> list[int]:
        """The steps of the checkpoints that are there, rising."""
        if not self._folder.is_dir():
            return []
        found = (_NAME.fullmatch(entry.name) for entry in self._folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        """The folder of one checkpoint."""
        return self._folder / f"step-{step:08d}"

    def save(self, step: int) -> None:
        """Writes the state as the checkpoint of `step`; a whole one that is there is kept.

        Raises:
          RunError: it could not be written; the earlier ones are intact.
        """
        target = self.path(step)
        if target.exists() and step not in self._damaged:
            return
        partial = target.with_name(f"partial-{step:08d}")
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            self._state.write(str(partial / _FILE))
            for path in [*partial.iterdir(), partial]:
                _sync(path)
            for damaged in self._damaged:  # they would count as the newest
                shutil.rmtree(self.path(damaged), ignore_errors=True)
            self._damaged.clear()
            partial.rename(target)
            _sync(self._folder)
        except (OSError, tf.errors.OpError) as error:
            with contextlib.suppress(OSError):
                shutil.rmtree(partial)
            message = str(getattr(error, "message", error)).splitlines()[0]
            raise RunError(
                f"the checkpoint of step {step} could not be written to {self._folder} ({message});"
                " the earlier ones are intact"
            ) from error
        for old in self.steps()[: -self._keep]:
            shutil.rmtree(self.path(old), ignore_errors=True)

    def restore(self) -> int | None:
        """Restores the newest checkpoint that is whole; its step, or None if there is none at all.

        Raises:
          RunError: there are checkpoints, but all are damaged.
          UsageError: the newest is of another model or optimizer.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                # A ValueError is a weight of another shape: not damage, and not to be skipped.
                status = self._state.read(str(self.path(step) / _FILE))
                status.assert_existing_objects_matched().assert_consumed()
            except (AssertionError, ValueError) as error:
                raise UsageError(
                    f"{self.path(step)} is of another model or optimizer; use a new --workdir"
                ) from error
            except (tf.errors.OpError, OSError, IndexError) as error:  # IndexError: a short file
                message = str(getattr(error, "message", error)).splitlines()[0]
                logging.warning("checkpoint %s is damaged, skipped: %s", self.path(step), message)
                self._damaged.add(step)
                continue
            return step
        if steps:
            raise RunError(
                f"all {len(steps)} checkpoints in {self._folder} are damaged; move the folder away"
                " to start again from the beginning"
            )
        return None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
