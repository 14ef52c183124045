"""Workdir: the folder of a run. Written by the chief alone, by one process at a time.

One that only tf.io.gfile reaches (gs://bucket/run) is worked on in a temporary folder here, and
copied there before each checkpoint and in the end; the checkpoints go there directly. Only
follow.jsonl is a follower's: the chief has no copy of it, which would overwrite newer rows.
"""

import contextlib
import fcntl
import itertools
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dist_train.errors import RunError, UsageError
from dist_train.settings import differences
from dist_train.storage import is_remote

_LOCK = ".lock"


class Workdir:
    """Where everything of a run lies; open it with `Workdir.locked`.

    Attributes:
      name: as the user calls it.
      path: the local folder, which is another one if `name` is remote.
      checkpoints: their folder, as a path or as tf.io.gfile's.
    """

    def __init__(self, path: Path, *, name: str | None = None, lock: int | None = None):
        self.path = path
        self.name = name or str(path)
        self._lock = lock
        self.config = path / "config.json"
        self.metrics = path / "metrics.jsonl"
        self.followed = path / "follow.jsonl"
        self.checkpoints = f"{self.name.rstrip('/')}/checkpoints"
        self.tensorboard = path / "tensorboard"
        self.model = path / "model.keras"
        self.saved_model = path / "saved_model"
        self.curves = path / "curves.png"
        self.report = path / "report.html"

    @classmethod
    @contextlib.contextmanager
    def locked(cls, path: str | None, *, create: bool = True) -> Iterator["Workdir"]:
        """The folder, made if need be, and locked against a second run until the context ends.

        A remote one is not locked: its stores have no means for it.

        Args:
          path: None: runs/<UTC time>, a new one.
          create: whether a missing folder is made.

        Raises:
          UsageError: it cannot be made or written, or another run uses it.
        """
        path = path or _fresh()
        if is_remote(path):
            with tempfile.TemporaryDirectory(prefix="dist_train-") as local:
                workdir = cls(Path(local), name=path)
                workdir._make(create)
                workdir.fetch(workdir.config, workdir.metrics)
                yield workdir
            return
        folder = Path(path)
        if not create and not folder.is_dir():
            raise UsageError(f"workdir={folder} does not exist")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
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
            yield cls(folder, lock=descriptor)
        finally:
            os.close(descriptor)

    def check_present(self) -> None:
        """Raises RunError if the folder was removed, or replaced, while the run goes on."""
        if self._lock is None:
            return
        try:
            there = os.path.samestat(os.stat(self.path / _LOCK), os.fstat(self._lock))
        except OSError:
            there = False
        if not there:
            raise RunError(
                f"workdir={self.name} was removed while the run went on; nothing more is written"
                " there. Start again with another --workdir, or put it back"
            )

    def push(self, *paths: Path) -> None:
        """Copies to where the folder really is, if that is elsewhere.

        Args:
          paths: files in `path`; none: all that are there, the checkpoints being elsewhere already.

        Raises:
          RunError: it cannot be written.
        """
        if not is_remote(self.name):
            return
        import tensorflow as tf

        try:
            for path in paths or self.path.rglob("*"):
                target = f"{self.name.rstrip('/')}/{path.relative_to(self.path)}"
                if path.is_file() and path.suffix != ".partial":
                    tf.io.gfile.makedirs(os.path.dirname(target))
                    # A follower may be reading, and not every store copies a file whole or not at
                    # all, as gs:// does: hdfs:// and file:// do not.
                    tf.io.gfile.copy(str(path), f"{target}.partial", overwrite=True)
                    tf.io.gfile.rename(f"{target}.partial", target, overwrite=True)
        except tf.errors.OpError as error:
            raise RunError(f"workdir={self.name} cannot be written: {error.message}") from error

    def fetch(self, *paths: Path) -> None:
        """Copies from where the folder really is, if that is elsewhere.

        Args:
          paths: files in `path`; one that is not there is removed here too.

        Raises:
          UsageError: it cannot be read.
        """
        if not is_remote(self.name):
            return
        import tensorflow as tf

        with self._reached():
            for path in paths:
                source = f"{self.name.rstrip('/')}/{path.relative_to(self.path)}"
                if tf.io.gfile.exists(source):
                    tf.io.gfile.copy(source, str(path), overwrite=True)
                else:
                    path.unlink(missing_ok=True)

    def _make(self, create: bool) -> None:
        """The remote folder, as `locked` says."""
        import tensorflow as tf

        with self._reached():
            if create:
                tf.io.gfile.makedirs(self.name)
            elif not tf.io.gfile.isdir(self.name):
                raise UsageError(f"workdir={self.name} does not exist")

    @contextlib.contextmanager
    def _reached(self) -> Iterator[None]:
        import tensorflow as tf

        try:
            yield
        except tf.errors.OpError as error:
            raise UsageError(
                f"workdir={self.name} cannot be used: {error.message}; use another --workdir"
            ) from error

    def settings(self) -> dict[str, Any]:
        """Those of the folder's run, as it has them now; {} if there is none yet.

        Raises:
          UsageError: its config.json is damaged, or cannot be read.
        """
        self.fetch(self.config)
        if not self.config.exists():
            return {}
        return {str(name): value for name, value in _saved(self.config)["config"].items()}

    def check_resumable(self, trajectory: Mapping[str, Any]) -> None:
        """Compares with the settings of the folder's run, as it has them now.

        Raises:
          UsageError: one that changes the trajectory differs; all of them are named.
        """
        saved = self.settings()
        theirs = {name: saved[name] for name in trajectory if name in saved}
        mine = {name: trajectory[name] for name in theirs}
        if different := differences(mine, theirs):
            shown = ", ".join(f"{name}={a!r} (was {b!r})" for name, (a, b) in different.items())
            raise UsageError(
                f"workdir={self.name} holds a run with other settings: {shown}; use those or"
                " another --workdir"
            )

    def changed(self, task: Mapping[str, str]) -> list[str]:
        """What the start before has known of the task, and knew otherwise."""
        before = _saved(self.config).get("task")
        if not before or not isinstance(before, dict):  # of a version that knew nothing
            return []
        return [name for name in {**before, **task} if before.get(name) != task.get(name)]

    def write_config(
        self, config: Mapping[str, Any], versions: Mapping[str, str], task: Mapping[str, str]
    ) -> None:
        """Writes config.json, whole or not at all."""
        saved = {"config": dict(config), "versions": dict(versions), "task": dict(task)}
        partial = self.config.with_suffix(".partial")
        partial.write_text(json.dumps(saved, indent=2) + "\n")
        partial.replace(self.config)


def _fresh() -> str:
    """A new folder in runs/, also for two runs that begin within a second."""
    name = time.strftime("runs/%Y-%m-%dT%H-%M-%SZ", time.gmtime())
    for path in itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2))):
        try:
            os.makedirs(path)
        except FileExistsError:
            continue
        except OSError:
            return path  # which will be explained
        return path
    raise AssertionError("there is always another number")


def saved_settings(folder: str) -> dict[str, Any]:
    """The settings of the run in a local folder; {} if there is none.

    Raises:
      UsageError: its config.json is damaged.
    """
    return Workdir(Path(folder)).settings()


def _saved(path: Path) -> dict[str, Any]:
    """All of a config.json, whose settings are there at least."""
    try:
        saved = json.loads(path.read_text())
        return saved | {"config": dict(saved["config"].items())}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(
            f"{path} is damaged ({error!r}); restore it or use another --workdir"
        ) from error
