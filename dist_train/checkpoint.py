"""Checkpoints: the whole state of a run, written while it goes on, verified when read.

Each is an entry `step-00000782` of a storage, in TensorFlow's object-based format (a CRC per
tensor); a reader or a crash sees all of it or nothing. The best one by validation is kept beside
them as `best-00000391`. Only the chief writes and reads; the other workers get the state from it,
so no shared filesystem is needed.
"""

import contextlib
import functools
import queue
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent import futures

import keras
import numpy as np
import tensorflow as tf
from absl import logging
from tensorflow.python.util.object_identity import ObjectIdentityDictionary

from dist_train.errors import RunError, UsageError
from dist_train.momentary import first_line, is_momentary
from dist_train.storage import FILE, Storage

_STEP = re.compile(r"step-(\d{8,})")
_BEST = re.compile(r"best-(\d{8,})")
BEST = "best"


class NotFinite(RunError):
    """A weight is not finite: such a state is no checkpoint."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
      storage: where they are.
      make_state: returns what they hold; each call a new object over the same variables.
      keep: how many of the newest are kept.
      before: called before a checkpoint appears, in the thread that writes it: what has to be
        durable by then.
      pins: the newest checkpoint of a step for which it is true is kept, however old.
    """

    def __init__(
        self,
        storage: Storage,
        make_state: Callable[[], tf.train.Checkpoint],
        *,
        keep: int,
        before: Callable[[], None] = lambda: None,
        pins: Callable[[int], bool] = lambda step: False,
    ):
        self._storage = storage
        self._state = make_state()
        self._make_state = make_state
        self._keep = keep
        self._before = before
        self._pins = pins
        self._damaged: set[int] = set()  # steps that `restore` has skipped
        self._copy: _Copy | None = None
        # One thread for all: TensorFlow takes 8 MiB for each, which the C library keeps by thread.
        self._saves: _Saves | None = None
        self._written: futures.Future[None] | None = None

    def steps(self) -> list[int]:
        """The steps of the checkpoints that are there, rising; the best one is not counted."""
        return _numbers(_STEP, self._storage.names())

    def save(self, step: int, *, best: bool = False, anew: bool = False) -> None:
        """Begins to write the state, as it is now, as the checkpoint of `step`.

        Waits for the one before, if need be; a whole one that is there is kept.

        Args:
          best: whether it becomes the best one too.
          anew: whether it replaces even a whole one.

        Raises:
          RunError: the one before could not be written; the earlier ones are intact.
        """
        self.wait()
        if self._copy is None:
            self._copy = _Copy(self._make_state())
        self._copy.take()
        if self._saves is None:
            self._saves = queue.SimpleQueue()
            threading.Thread(
                target=_serve, args=(self._saves,), name="checkpoint", daemon=True
            ).start()
        self._written = futures.Future()
        self._saves.put((self._written, functools.partial(self._write, step, best, anew)))

    def wait(self) -> None:
        """Returns when what `save` began is done; raises as it does."""
        if self._written is not None:
            futures.wait([self._written])
            written, self._written = self._written, None
            written.result()

    def check(self) -> None:
        """Raises what a save in the background has failed with, without waiting for it."""
        if self._written is not None and self._written.done():
            self.wait()

    def close(self) -> None:
        """Ends the thread that writes, after what was begun; a further `save` starts another."""
        if self._saves is not None:
            self._saves.put(None)
            self._saves = None

    def restore(self, name: str | None = None) -> int | None:
        """Restores the newest checkpoint that is whole, or the one of a name.

        Args:
          name: a step, 'best', or the path of a checkpoint anywhere; None: the newest.

        Returns:
          Its step, or None if there is none at all.

        Raises:
          RunError: there are checkpoints, but all are damaged, or one cannot be read for now.
          UsageError: it is of another model or optimizer, or there is none of that name.
        """
        if name is not None:
            prefix = self._find(name)
            while (damage := self._read(prefix)) is not None:
                before, prefix = prefix, self._find(name)
                if prefix == before:
                    raise RunError(f"checkpoint {prefix} is damaged: {damage}")
            match = re.search(r"(?:step|best)-(\d{8,})", prefix.removesuffix(FILE))
            return int(match[1]) if match else 0
        damaged: set[int] = set()
        while steps := set(self.steps()) - damaged:
            step = max(steps)
            prefix = self._storage.prefix(name_of(step))
            damage = self._read(prefix)
            if damage is None:
                return step
            if step not in self.steps():
                continue  # the run that wrote it has removed it meanwhile, and has newer ones
            logging.warning("checkpoint %s is damaged, skipped: %s", _folder(prefix), damage)
            damaged.add(step)
            self._damaged.add(step)
        if damaged:
            raise RunError(
                f"all {len(damaged)} checkpoints in {self._storage} are damaged; move the folder"
                " away to start again from the beginning"
            )
        return None

    def restore_best(self, step: int) -> None:
        """Restores the best checkpoint, which must be that of `step`.

        Raises:
          RunError: it is not there, is damaged or cannot be read.
          UsageError: it is of another model or optimizer.
        """
        name = name_of(step, BEST)
        if name not in self._storage.names():
            raise RunError(
                f"{name}, whose weights early stopping ends with, is not in {self._storage}; put it"
                " back and run the same command again, or train on with --early_stopping=0"
            )
        self.restore(self._storage.prefix(name))

    def mend_best(self, step: int) -> None:
        """Makes the best checkpoint, that of `step`, again if the run ended before it was there.

        Raises:
          RunError: it cannot be written.
        """
        names = self._storage.names()
        if name_of(step) in names and name_of(step, BEST) not in names:
            self._copy_as_best(step)

    def _read(self, prefix: str) -> str | None:
        """Restores from a path; what is damaged, or None.

        Raises:
          RunError: it cannot be read for now, which says nothing of it.
          UsageError: it is of another model or optimizer.
        """
        try:
            # A ValueError is a weight of another shape: not damage, and not to be skipped.
            status = self._state.read(prefix)
            status.assert_existing_objects_matched().assert_consumed()
        except (AssertionError, ValueError) as error:
            raise UsageError(
                f"{_folder(prefix)} is of another model or optimizer; use a new --workdir"
            ) from error
        # IndexError: a short file.
        except (tf.errors.OpError, OSError, MemoryError, IndexError) as error:
            message = first_line(error)
            if is_momentary(error, prefix):
                raise RunError(
                    f"checkpoint {_folder(prefix)} cannot be read: {message};"
                    " run the same command again when it can be"
                ) from error
            return message
        return None

    def _find(self, name: str) -> str:
        entries = self._storage.names()
        if name == BEST and (found := _numbers(_BEST, entries)):
            return self._storage.prefix(name_of(found[-1], BEST))
        if name.isdecimal() and name_of(int(name)) in entries:
            return self._storage.prefix(name_of(int(name)))
        path = name.rstrip("/").removesuffix(f"/{FILE}")
        if tf.io.gfile.exists(f"{path}/{FILE}.index"):
            return f"{path}/{FILE}"
        have = [*map(str, self.steps()), *([BEST] if _numbers(_BEST, entries) else [])]
        raise UsageError(
            f"checkpoint={name!r} is neither one of those in {self._storage}"
            f" ({', '.join(have) or 'none'}) nor the folder of another"
        )

    # In the thread that writes.

    def _write(self, step: int, best: bool, anew: bool) -> None:
        with self._explained(f"the checkpoint of step {step} could not be written to"):
            self._write_step(step, anew)
        if best:
            self._copy_as_best(step)
        with self._explained("an old checkpoint could not be removed from"):
            self._remove_old()

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except (OSError, tf.errors.OpError) as error:
            raise RunError(
                f"{what} {self._storage} ({first_line(error)}); the earlier ones are intact"
            ) from error

    def _write_step(self, step: int, anew: bool) -> None:
        assert self._copy is not None
        name = name_of(step)
        if (path := self._copy.not_finite()) is not None:
            raise NotFinite(
                f"{path} is not finite after step {step}; what was saved before is kept."
                " Try a smaller --learning_rate, or --clip_norm"
            )
        self._before()
        if anew or step in self._damaged or name not in self._storage.names():
            partial = self._storage.partial(name)
            try:
                self._copy.write(str(partial / FILE))
                self._storage.publish(name)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)  # a full disk needs the room
                raise
        for damaged in self._damaged - {step}:  # they would count as the newest
            self._storage.remove(name_of(damaged))
        self._damaged.clear()

    def _copy_as_best(self, step: int) -> None:
        with self._explained(f"the checkpoint of step {step} could not be kept as the best one in"):
            self._storage.duplicate(name_of(step), name_of(step, BEST))
            for old in _numbers(_BEST, self._storage.names()):
                if old != step:
                    self._storage.remove(name_of(old, BEST))

    def _remove_old(self) -> None:
        steps = self.steps()
        pinned = max(filter(self._pins, steps), default=None)
        for old in steps[: -self._keep]:
            if old != pinned:
                self._storage.remove(name_of(old))


_Saves = queue.SimpleQueue[tuple[futures.Future[None], Callable[[], None]] | None]


def _serve(saves: _Saves) -> None:
    """Does what comes, until None does. (An executor's thread would hold up Python's end.)"""
    while (save := saves.get()) is not None:
        written, write = save
        try:
            written.set_result(write())
        except BaseException as error:
            written.set_exception(error)


class _Copy:
    """A copy of the state on the CPU, which a thread can write while the training goes on.

    What `CheckpointOptions(experimental_enable_async_checkpoint=True)` does, without its thread
    and its copies, which live until the process ends.
    """

    def __init__(self, state: tf.train.Checkpoint):
        self._state = state
        self._copies = ObjectIdentityDictionary()
        state._saver._object_map = self._copies
        self._variables = [
            trackable
            for trackable in tf.train.TrackableView(state).descendants()
            if isinstance(trackable, tf.Variable | keras.Variable)
        ]

    def take(self) -> None:
        """Copies the state as it is now.

        (Keras's own `_copy_trackable_to_cpu` keeps two copies of each, one of them made anew.)
        """
        for variable in self._variables:
            value = variable.value if isinstance(variable, keras.Variable) else variable
            if variable in self._copies:
                self._copies[variable].assign(value, read_value=False)
            else:
                with tf.device("CPU:0"):
                    self._copies[variable] = tf.Variable(value, shape=value.shape, trainable=False)

    def write(self, prefix: str) -> None:
        """Writes the copy in the format of tf.train.Checkpoint."""
        self._state.write(prefix)

    def not_finite(self) -> str | None:
        """The path of a weight of the copy that is not finite, or None."""
        for variable in self._variables:
            if isinstance(variable, keras.Variable) and variable.trainable:
                value = self._copies[variable].numpy()
                if not is_finite(value):
                    return str(variable.path)
        return None


def is_finite(weight: np.ndarray) -> bool:
    """Whether all of a weight is, of any float dtype."""
    return bool(np.all(np.isfinite(weight.astype(np.float32, copy=False))))


def name_of(step: int, kind: str = "step") -> str:
    """What a checkpoint is called in its folder; `kind` may be BEST."""
    return f"{kind}-{step:08d}"


def _numbers(pattern: re.Pattern, names: list[str]) -> list[int]:
    return sorted(int(match[1]) for match in map(pattern.fullmatch, names) if match)


def _folder(prefix: str) -> str:
    return prefix.removesuffix(f"/{FILE}")
