"""Reading: what a source gives for some indices, checked, into memory that is used again."""

from typing import Any

import numpy as np
import tensorflow as tf

from dist_train.buffers import Buffers
from dist_train.errors import UsageError
from dist_train.examples import Arrays, Source, spaced
from dist_train.readahead import Readahead

# The kinds of dtypes of strings, of which a few are looked at, and at most so many read at once:
# others may be longer.
_TEXTS = "OSU"
_SEEN_TEXTS = 64
_TEXTS_AT_ONCE = 4096


def fetch(source: Source, indices: np.ndarray) -> tuple[Any, Any]:
    """(x, y) of the examples at `indices`, arrays of that length.

    Raises:
      UsageError: the source gives something else.
    """
    name, count = f"{type(source).__name__}.__getitem__", len(indices)
    try:
        found = source[indices.astype(np.int64)]
    except (TypeError, IndexError) as error:
        raise UsageError(f"{name} failed for an array of {count} indices: {error}") from error
    if not isinstance(found, tuple | list) or len(found) != 2:
        raise UsageError(f"{name} gave a {type(found).__name__}; it must give (x, y)")
    found = tf.nest.map_structure(np.asarray, tuple(found))
    for array in tf.nest.flatten(found):
        if array.shape[:1] != (count,):
            raise UsageError(
                f"{name} gave an array of shape {list(array.shape)} for {count} indices; the first"
                " axis of each must have that length"
            )
    return found


def examples_within(size: int, source: Source) -> int:
    """How many examples are about so many bytes. Raises as `fetch` does."""
    arrays = tf.nest.flatten(fetch(source, np.zeros(1, np.int64)))
    if not any(array.dtype.kind in _TEXTS for array in arrays):
        return size // max(1, sum(array.nbytes for array in arrays))
    arrays = tf.nest.flatten(fetch(source, spaced(source, _SEEN_TEXTS)))
    each = sum(map(_bytes, arrays)) // len(arrays[0])
    return min(_TEXTS_AT_ONCE, size // max(1, each))


class Reader:
    """Reads examples of a source, for several threads at a time.

    Attributes:
      template: (x, y) of one example, arrays [1, …]: all others are of these shapes and types.
    """

    def __init__(self, source: Source):
        self.template = fetch(source, np.zeros(1, np.int64))
        self._source = source
        self._like = tf.nest.flatten(self.template)
        self._buffers = Buffers()
        self._whole: list[tuple[np.ndarray, Readahead]] | None = None
        if isinstance(source, Arrays):
            arrays = tf.nest.flatten((source.x, source.y))
            self._whole = [(array, Readahead(array)) for array in arrays]

    def read(self, rows: np.ndarray) -> list[np.ndarray]:
        """The arrays of (x, y), flat, [n, …] each.

        Args:
          rows: [n] integers, the indices of the examples.

        Raises:
          UsageError: the source gives something else than before, or than it should.
        """
        if self._whole is None:
            found = tf.nest.flatten(fetch(self._source, rows))
            for array, like in zip(found, self._like, strict=True):
                self._check(array, like)
            return [self._buffers.copy(array) for array in found]
        found = []
        for array, readahead in self._whole:
            with readahead.reading(rows):
                found.append(self._buffers.take(array, rows))
        return found

    def _check(self, array: np.ndarray, like: np.ndarray) -> None:
        shape, dtype = array.shape[1:], tf.as_dtype(array.dtype)
        first_shape, first_dtype = like.shape[1:], tf.as_dtype(like.dtype)
        if (shape, dtype) != (first_shape, first_dtype):
            raise UsageError(
                f"{type(self._source).__name__}.__getitem__ gave examples of shape {list(shape)}"
                f" and type {dtype.name}, and before of {list(first_shape)} and"
                f" {first_dtype.name}; all must be alike: pad texts, say, to one length"
            )


def _bytes(array: np.ndarray) -> int:
    """Of an array; of strings as objects NumPy counts only the references."""
    return array.nbytes if array.dtype.kind != "O" else sum(map(len, array.ravel()))
