"""Prediction: what a trained model says of files of images or arrays, one line an example."""

import contextlib
import csv
import dataclasses
import glob
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import tensorflow as tf

from dist_train.config import Config
from dist_train.errors import RunError, UsageError
from dist_train.examples import Source
from dist_train.program import Program, as_float32
from dist_train.reading import fetch
from dist_train.review import has_labels, number_of_classes, probabilities

_IMAGES = (".png", ".jpg", ".jpeg")
_ARRAYS = (".npy", ".npz")
_SEEN = 256  # training examples from which the range of the inputs is known


@dataclasses.dataclass(frozen=True)
class Example:
    """One input, as the task's `x` has it, and where it is from."""

    file: str
    index: int
    x: Any


def rows(source: Source, program: Program, config: Config) -> Iterator[dict[str, Any]]:
    """An object for each example of config.predict_on; see `Predictor`."""
    predictor = Predictor(source, program, batch_size=config.batch_size)
    return predictor.rows(expand(config.predict_on or ""))


class Predictor:
    """Says what a model makes of inputs like those of a task.

    Args:
      source: the training examples, of which the inputs must have shape and type.
      program: whose model and preprocessing are used, as in an evaluation.
      batch_size: of a call of the model.
    """

    def __init__(self, source: Source, program: Program, *, batch_size: int):
        rows = np.arange(min(_SEEN, len(source)))
        self._seen, y = fetch(source, rows)
        self._y = tf.nest.map_structure(lambda array: np.asarray(array)[:1], y)
        self._classifies = has_labels(y)
        self._program = program
        self._batch_size = batch_size

    def rows(self, paths: Iterable[str]) -> Iterator[dict[str, Any]]:
        """An object for each example of the files: file, index, and what the model says.

        Of a classifier that is label, probability and probabilities; else outputs.

        Raises:
          UsageError: a file is missing, damaged, or does not fit the model.
        """
        predict = self._predict()
        batch: list[Example] = []
        for example in self._examples(paths):
            batch.append(example)
            if len(batch) == self._batch_size:
                yield from self._said(predict, batch)
                batch = []
        if batch:
            yield from self._said(predict, batch)

    def _examples(self, paths: Iterable[str]) -> Iterator[Example]:
        for path in paths:
            if not os.path.isfile(path):
                raise UsageError(f"predict_on={path} is no file")
            suffix = Path(path).suffix.lower()
            if suffix in _IMAGES:
                yield Example(path, 0, self._image(path))
            elif suffix in _ARRAYS:
                arrays, length = self._arrays(path)
                for index in range(length):
                    x = tf.nest.map_structure(lambda array, at=index: array[at], arrays)
                    yield Example(path, index, x)
            else:
                raise UsageError(
                    f"predict_on={path} is none of {', '.join(_IMAGES + _ARRAYS)}; convert it"
                )

    def _image(self, path: str) -> np.ndarray:
        """A picture in the shape, type and range of the task's."""
        if not isinstance(self._seen, np.ndarray):
            raise UsageError(
                f"{path}: the task's inputs are no pictures; give an .npz of its arrays"
            )
        wanted = self._seen.shape[1:]
        channels = 1 if len(wanted) == 2 else wanted[2] if len(wanted) == 3 else 0
        if channels not in (1, 3, 4):
            raise UsageError(f"{path}: the task's inputs are {_shape(wanted)}, no pictures")
        try:
            data = tf.io.read_file(path)
            pixels = tf.io.decode_image(data, channels=channels, expand_animations=False).numpy()
        except tf.errors.OpError as error:
            text = str(error.message).splitlines()[0][:200]
            raise UsageError(f"{path} cannot be read as an image: {text}") from error
        pixels = pixels.reshape(pixels.shape[:2]) if len(wanted) == 2 else pixels
        if pixels.shape != wanted:
            raise UsageError(
                f"{path} is {_shape(pixels.shape)}; the task's inputs are {_shape(wanted)}:"
                " resize it"
            )
        if self._seen.dtype == np.uint8:
            return pixels
        least, most = float(self._seen.min()), float(self._seen.max())
        if least < 0.0 or most > 255.0:
            raise UsageError(
                f"{path}: the task's inputs are {self._seen.dtype} from {least:g} to {most:g}, so"
                " it is not known how an image becomes one; give arrays (.npy)"
            )
        scale = 1.0 if most > 1.0 else 255.0
        return (pixels / scale).astype(self._seen.dtype)

    def _arrays(self, path: str) -> tuple[Any, int]:
        """(arrays like the task's x, how many examples they have) of an .npy or .npz."""
        arrays = self._fitted(path, _read(path))
        lengths = {len(array) for array in tf.nest.flatten(arrays)}
        if len(lengths) != 1:
            raise UsageError(f"{path} has arrays of {sorted(lengths)} examples; use equal lengths")
        return arrays, lengths.pop()

    def _fitted(self, path: str, found: dict[str, np.ndarray]) -> Any:
        seen = self._seen
        if isinstance(seen, dict):
            missing = [name for name in seen if name not in found]
            if missing:
                raise UsageError(
                    f"{path} has no array {', '.join(missing)}; it must hold {', '.join(seen)}"
                )
            return {name: _fit(f"{path}: {name}", found[name], seen[name]) for name in seen}
        if isinstance(seen, tuple | list):
            names = [f"arr_{number}" for number in range(len(seen))]  # numpy's for those without
            if missing := [name for name in names if name not in found]:
                raise UsageError(
                    f"{path} has no array {', '.join(missing)}; save all inputs in order"
                )
            pairs = zip(names, seen, strict=True)
            return type(seen)(_fit(f"{path}: {name}", found[name], like) for name, like in pairs)
        if len(found) > 1 and "x" not in found:
            raise UsageError(
                f"{path} holds {', '.join(found)}; name the one to predict on 'x', or save it alone"
            )
        name = "x" if "x" in found else next(iter(found))
        return _fit(path, found[name], seen)

    def _predict(self) -> Callable[[Any, Any], Any]:
        program = self._program

        @tf.function(autograph=False)
        def predict(x: Any, y: Any) -> Any:
            x, _ = program.prepared((x, y))
            return tf.nest.map_structure(as_float32, program.model(x, training=False))

        return predict

    def _said(self, predict: Callable, batch: list[Example]) -> Iterator[dict[str, Any]]:
        # Filled up, so that the model is traced once.
        filled = [*batch, *[batch[-1]] * (self._batch_size - len(batch))]
        x = tf.nest.map_structure(
            lambda like, *each: _stacked(each, like.dtype),
            self._seen,
            *(example.x for example in filled),
        )
        y = tf.nest.map_structure(lambda array: np.repeat(array, len(filled), axis=0), self._y)
        outputs = predict(*tf.nest.map_structure(tf.convert_to_tensor, (x, y)))
        where = [{"file": example.file, "index": example.index} for example in batch]
        if self._classifies and number_of_classes(outputs, most=None):
            chances = probabilities(outputs.numpy().astype(np.float64))
            for place, each in zip(where, chances, strict=False):
                label = int(each.argmax())
                yield place | {
                    "label": label,
                    "probability": float(each[label]),
                    "probabilities": _plain(each),
                }
            return
        arrays = tf.nest.map_structure(lambda output: output.numpy(), outputs)
        for row, place in enumerate(where):
            said = tf.nest.map_structure(lambda array, at=row: _plain(array[at]), arrays)
            yield place | {"outputs": said}


def expand(spec: str) -> list[str]:
    """The paths of 'a.png,b*.npy': separated by commas, patterns in the order of their names.

    Raises:
      UsageError: a pattern matches nothing.
    """
    paths: list[str] = []
    for part in filter(None, spec.split(",")):
        found = (
            sorted(glob.glob(part)) if glob.has_magic(part) and not Path(part).exists() else [part]
        )
        if not found:
            raise UsageError(f"predict_on={part} matches no file")
        paths += found
    return paths


def write(rows: Iterable[dict[str, Any]], output: str | None) -> int:
    """Writes JSON lines, or CSV where the name ends so; how many.

    Args:
      rows: of `Predictor.rows`.
      output: the file, written whole or not at all; None: standard output, line by line.

    Raises:
      RunError: it cannot be written.
    """
    if output is None:
        try:
            count = _write_to(sys.stdout, rows, as_csv=False)
            sys.stdout.flush()
        except BrokenPipeError as error:
            # Python would try again to write the rest at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise RunError("standard output was closed before the last prediction") from error
        return count
    path = Path(output)
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("w", newline="") as file:
            count = _write_to(file, rows, as_csv=path.suffix.lower() == ".csv")
        partial.replace(path)
    except OSError as error:
        raise RunError(f"output={output} cannot be written: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    return count


def _write_to(file: TextIO, rows: Iterable[dict[str, Any]], *, as_csv: bool) -> int:
    count, table = 0, None
    for row in rows:
        count += 1
        if not as_csv:
            file.write(json.dumps(row) + "\n")
            continue
        flat = dict(_columns(row))
        if table is None:
            table = csv.DictWriter(file, list(flat))
            table.writeheader()
        table.writerow(flat)
    return count


def _columns(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(column, number) of every number in nested dicts and lists: outputs_0, outputs_1, …"""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, each in items:
            yield from _columns(each, f"{name}_{key}" if name else str(key))
    else:
        yield name, value


def _plain(array: np.ndarray) -> Any:
    """Nested lists; JSON has no word for what is not finite."""
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        words = array.astype(object)
        words[~np.isfinite(array)] = None
        return words.tolist()
    return array.tolist()


def _read(path: str) -> dict[str, np.ndarray]:
    """{name: array} of an .npz; of an .npy its array alone, read as it is needed."""
    try:
        # Never unpickle: an object array could run code.
        if path.lower().endswith(".npy"):
            return {"x": np.load(path, mmap_mode="r", allow_pickle=False)}
        with np.load(path, allow_pickle=False) as archive:
            return {name: np.asarray(archive[name]) for name in archive.files}
    except Exception as error:  # numpy and zipfile raise a dozen kinds at damaged bytes
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(f"{path} cannot be read: {reason[:200]}") from error


def _fit(what: str, array: np.ndarray, like: np.ndarray) -> np.ndarray:
    """The array as [examples, …] of the task's type; one example may come without that axis."""
    wanted = like.shape[1:]
    if array.shape == wanted:
        array = array[np.newaxis]
    if array.shape[1:] != wanted or array.ndim == 0:
        raise UsageError(
            f"{what} is {_shape(array.shape)}; the task's inputs are {_shape(wanted)}, with or"
            " without an axis of examples before"
        )
    small = like.dtype.kind in "iu" and array.dtype.kind in "iu" and array.size
    limits = np.iinfo(like.dtype) if small else None
    fits = limits is not None and limits.min <= array.min() and array.max() <= limits.max
    if not fits and not np.can_cast(array.dtype, like.dtype, "same_kind"):
        raise UsageError(f"{what} is {array.dtype}; the task's inputs are {like.dtype}: convert it")
    return array


def _stacked(arrays: Sequence[np.ndarray], dtype: np.dtype) -> np.ndarray:
    stacked = np.stack(arrays)
    # As wide as the widest string is, not as those of the training.
    return stacked if dtype.kind in "SU" else stacked.astype(dtype, copy=False)


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a single number"
