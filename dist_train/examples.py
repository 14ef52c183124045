"""Examples: arrays of equal length, or anything that can be indexed at random."""

import zlib
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np

from dist_train.errors import UsageError

Tree = Any  # an array, or a dict, list or tuple of trees


@runtime_checkable
class Source(Protocol):
    """Examples that can be read at random; what does not fit in memory is one of these."""

    def __len__(self) -> int:
        """The number of examples."""
        ...

    def __getitem__(self, indices: np.ndarray) -> tuple[Tree, Tree]:
        """(x, y) of the examples at `indices`, [n] int64; every array in them has length n."""
        ...


class Arrays:
    """Arrays of equal length, the examples along the first axis.

    Args:
      x: the inputs: an array, or a dict or tuple of arrays; numpy.memmap is read as needed.
      y: the targets, likewise.

    Raises:
      UsageError: the lengths differ, or an array is empty, ragged or of Python objects.
    """

    def __init__(self, x: Tree, y: Tree):
        self.x = _map(_as_array, x)
        self.y = _map(_as_array, y)
        lengths = {len(array) for array in self.arrays()}
        if len(lengths) != 1:
            raise UsageError(
                f"arrays of {sorted(lengths)} examples; x and y must have the same length"
            )
        (self._length,) = lengths

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, indices: np.ndarray) -> tuple[Tree, Tree]:
        return _map(lambda a: a[indices], self.x), _map(lambda a: a[indices], self.y)

    def arrays(self) -> Iterator[np.ndarray]:
        """Every array of x and y."""
        yield from _leaves(self.x)
        yield from _leaves(self.y)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays())

    @property
    def in_memory(self) -> bool:
        """Whether no array is a file that is read as needed."""
        return not any(isinstance(array, np.memmap) for array in self.arrays())


# Enough rows to notice another file or another order, few enough for one that fills a disk.
_DIGEST_ROWS = 2048


def digest(source: Source) -> int:
    """A 32-bit checksum of the examples, to compare between workers.

    Arrays in memory are read whole; of anything else the length and up to 2,048 examples, evenly
    spaced, are.
    """
    checksum = zlib.crc32(str(len(source)).encode())
    if isinstance(source, Arrays) and source.in_memory:
        arrays = source.arrays()
    else:
        rows = np.unique(np.linspace(0, len(source) - 1, _DIGEST_ROWS).astype(np.int64))
        arrays = _leaves(source[rows])
    for array in arrays:
        array = np.ascontiguousarray(array)
        checksum = zlib.crc32(f"{array.dtype}{array.shape}".encode(), checksum)
        checksum = zlib.crc32(array.reshape(-1).view(np.uint8).data, checksum)
    return checksum


def _as_array(value: Any) -> np.ndarray:
    try:
        array = value if isinstance(value, np.ndarray) else np.asarray(value)
    except ValueError as error:  # numpy's words for a ragged list
        raise UsageError(
            f"a {type(value).__name__} is no array ({error}); give all examples the same shape"
        ) from error
    if array.dtype.hasobject:
        raise UsageError("an array holds Python objects; give it a number or string dtype")
    if array.ndim == 0:
        raise UsageError("an array has no axis of examples; give it the shape [examples, ...]")
    if array.size == 0:
        raise UsageError(f"an array of shape {list(array.shape)} holds nothing; drop it or fill it")
    return array


def _map(fn, tree: Tree) -> Tree:
    """`fn` of every leaf of a dict or tuple; a list is data, as in numpy."""
    if isinstance(tree, dict):
        return {key: _map(fn, value) for key, value in tree.items()}
    if isinstance(tree, tuple):
        return tuple(_map(fn, value) for value in tree)
    return fn(tree)


def _leaves(tree: Tree) -> Iterator[np.ndarray]:
    if isinstance(tree, dict):
        for key in tree:
            yield from _leaves(tree[key])
    elif isinstance(tree, tuple):
        for value in tree:
            yield from _leaves(value)
    else:
        yield tree
