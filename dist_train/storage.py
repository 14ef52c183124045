"""Storage: folders in which an entry appears whole or not at all, here or in a remote store.

An entry is a folder of files. On a local (or mounted) filesystem it is written under another name,
synced to the disk and renamed. Remote stores, as tf.io.gfile reaches them (gs://, s3://, hdfs://),
have no such rename and no sync: there the files are copied, the index last, and an entry without
its index does not count.
"""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Protocol

FILE = "state"
_INDEX = f"{FILE}.index"


class Storage(Protocol):
    """A folder of entries. Every method raises OSError or tf.errors.OpError where it fails."""

    def names(self) -> list[str]:
        """The entries that are whole, in no order."""

    def partial(self, name: str) -> Path:
        """An empty local folder to write the files of an entry into."""

    def publish(self, name: str) -> None:
        """Makes what was written into `partial(name)` the entry `name`, durably."""

    def duplicate(self, name: str, other: str) -> None:
        """Makes `other` an entry with the files of `name`."""

    def remove(self, name: str) -> None:
        """Removes an entry; it need not be there."""

    def prefix(self, name: str) -> str:
        """What tf.train.Checkpoint calls the path of an entry."""


def is_remote(path: str) -> bool:
    """Whether a path is tf.io.gfile's alone: 'gs://bucket/folder'."""
    return "://" in path


def opened(path: str) -> Storage:
    """The storage at a path of either kind."""
    return RemoteStorage(path) if is_remote(path) else LocalStorage(Path(path))


class LocalStorage:
    """On a filesystem that renames atomically."""

    def __init__(self, folder: Path):
        self._folder = folder

    def __str__(self) -> str:
        return str(self._folder)

    def names(self) -> list[str]:
        if not self._folder.is_dir():
            return []
        return [e.name for e in self._folder.iterdir() if not e.name.startswith("partial-")]

    def partial(self, name: str) -> Path:
        for left in self._folder.glob("partial-*"):  # by a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        path = self._folder / f"partial-{name}"
        path.mkdir(parents=True)
        return path

    def publish(self, name: str) -> None:
        partial = self._folder / f"partial-{name}"
        for path in [*partial.iterdir(), partial]:
            _sync(path)
        condemned = self._set_aside(name)
        partial.rename(self._folder / name)  # at once: a kill in between would cost the entry
        _sync(self._folder)
        shutil.rmtree(condemned, ignore_errors=True)

    def duplicate(self, name: str, other: str) -> None:
        partial = self.partial(other)
        for path in (self._folder / name).iterdir():
            try:
                os.link(path, partial / path.name)
            except OSError:  # a filesystem without hard links
                shutil.copyfile(path, partial / path.name)
        self.publish(other)

    def remove(self, name: str) -> None:
        # What stays goes with the next `partial`.
        shutil.rmtree(self._set_aside(name), ignore_errors=True)

    def _set_aside(self, name: str) -> Path:
        """Who reads, also after a kill, finds an entry whole or not at all: it is renamed first."""
        condemned = self._folder / f"partial-removed-{name}"
        shutil.rmtree(condemned, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            (self._folder / name).rename(condemned)
        return condemned

    def prefix(self, name: str) -> str:
        return str(self._folder / name / FILE)


class RemoteStorage:
    """Where only tf.io.gfile gets to; files are written here first, and then copied there."""

    def __init__(self, folder: str):
        import tensorflow as tf  # seconds, which a local run of the command spends elsewhere

        self._gfile = tf.io.gfile
        self._folder = folder.rstrip("/")
        self._staged: dict[str, Path] = {}

    def __str__(self) -> str:
        return self._folder

    def names(self) -> list[str]:
        if not self._gfile.isdir(self._folder):
            return []
        entries = (entry.rstrip("/") for entry in self._gfile.listdir(self._folder))
        return [e for e in entries if self._gfile.exists(f"{self._folder}/{e}/{_INDEX}")]

    def partial(self, name: str) -> Path:
        self._staged[name] = Path(tempfile.mkdtemp(prefix="dist_train-"))
        return self._staged[name]

    def publish(self, name: str) -> None:
        staged = self._staged.pop(name)
        self._fill(name, {path.name: str(path) for path in staged.iterdir()})
        shutil.rmtree(staged)

    def duplicate(self, name: str, other: str) -> None:
        source = f"{self._folder}/{name}"
        self._fill(other, {entry: f"{source}/{entry}" for entry in self._gfile.listdir(source)})

    def remove(self, name: str) -> None:
        target = f"{self._folder}/{name}"
        if self._gfile.exists(f"{target}/{_INDEX}"):
            self._gfile.remove(f"{target}/{_INDEX}")
        if self._gfile.isdir(target):
            self._gfile.rmtree(target)

    def prefix(self, name: str) -> str:
        return f"{self._folder}/{name}/{FILE}"

    def _fill(self, name: str, sources: dict[str, str]) -> None:
        self.remove(name)
        self._gfile.makedirs(f"{self._folder}/{name}")
        for entry in sorted(sources, key=lambda entry: entry == _INDEX):
            self._gfile.copy(sources[entry], f"{self._folder}/{name}/{entry}", overwrite=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
