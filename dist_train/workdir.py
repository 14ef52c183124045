"""Workdir: the folder of a run. Written by the chief alone, by one process at a time."""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dist_train.config import differences
from dist_train.errors import UsageError


class Workdir:
    """Where everything of a run lies; open it with `Workdir.locked`."""

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.json"
        self.metrics = path / "metrics.jsonl"
        self.followed = path / "follow.jsonl"
        self.checkpoints = path / "checkpoints"
        self.tensorboard = path / "tensorboard"
        self.model = path / "model.keras"
        self.saved_model = path / "saved_model"
        self.curves = path / "curves.png"

    @classmethod
    @contextlib.contextmanager
    def locked(cls, path: str | None, *, create: bool = True) -> Iterator["Workdir"]:
        """The folder, made if need be, and locked against a second run until the context ends.

        Args:
          path: None: runs/<UTC time>.
          create: whether a missing folder is made.

        Raises:
          UsageError: it cannot be made or written, or another run uses it.
        """
        folder = Path(path or time.strftime("runs/%Y-%m-%dT%H-%M-%SZ", time.gmtime()))
        if not create and not folder.is_dir():
            raise UsageError(f"workdir={folder} does not exist")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UsageError(
                f"workdir={folder} cannot be written: {error.strerror}; use another --workdir"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise UsageError(
                f"workdir={folder} is in use by another run; wait for its end or use another"
            ) from None
        try:
            yield cls(folder)
        finally:
            os.close(descriptor)

    def check_resumable(self, trajectory: Mapping[str, Any]) -> None:
        """Compares with the settings that the folder's run was started with.

        Raises:
          UsageError: one that changes the trajectory differs; all of them are named.
        """
        if not self.config.exists():
            return
        try:
            saved = json.loads(self.config.read_text())["config"]
            theirs = {name: saved[name] for name in trajectory if name in saved}
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UsageError(
                f"{self.config} is damaged ({error!r}); restore it or use another --workdir"
            ) from error
        mine = {name: trajectory[name] for name in theirs}
        if different := differences(mine, theirs):
            shown = ", ".join(f"{name}={a!r} (was {b!r})" for name, (a, b) in different.items())
            raise UsageError(
                f"workdir={self.path} holds a run with other settings: {shown}; use those or"
                " another --workdir"
            )

    def write_config(self, config: Mapping[str, Any], versions: Mapping[str, str]) -> None:
        """Writes config.json, whole or not at all."""
        text = json.dumps({"config": dict(config), "versions": dict(versions)}, indent=2)
        partial = self.config.with_suffix(".partial")
        partial.write_text(text + "\n")
        partial.replace(self.config)
