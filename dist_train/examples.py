"""Examples: arrays of equal length, what can be indexed at random, or a tf.data.Dataset."""

import inspect
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np

from dist_train.errors import RunError, UsageError

# Of a Dataset: they are asked for several times before the training begins.
_KEPT = 8
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


class Dataset:
    """Examples in an order of their own: a tf.data.Dataset, made anew for each epoch.

    For what cannot be read at random. Its limits: the order is the dataset's (`shuffle` and `seed`
    do not reach it; to shuffle, let `make` take the epoch and do it by that); a resume within an
    epoch reads what came before in it and drops it; every worker reads the whole of it and uses
    its share; it is always streamed.

    Args:
      make: () or (epoch) -> tf.data.Dataset of single examples (x, y), all of the same shapes, not
        batched or repeated. It must give the same examples in the same order each time that it is
        called with the same epoch, on every worker. In evaluation the epoch is 0.
      examples: how many there are in an epoch, each epoch alike.

    Raises:
      UsageError: there are no examples.
    """

    def __init__(self, make: Callable[..., Any], *, examples: int):
        if not callable(make):
            raise UsageError(
                f"a Dataset of a {type(make).__name__}; give the function that makes it: lambda: …"
            )
        if examples < 1:
            raise UsageError(f"examples={examples} of a Dataset; use 1 or more")
        self._make = make
        self._examples = examples
        self._first: Tree | None = None
        first = next(iter(inspect.signature(make).parameters.values()), None)
        self._takes_epoch = first is not None and (
            first.name == "epoch" or first.default is first.empty
        )

    def __len__(self) -> int:
        return self._examples

    def __getitem__(self, indices: np.ndarray) -> tuple[Tree, Tree]:
        """Examples of epoch 0, all up to the last of them read: for a few at the beginning."""
        last = int(max(indices))
        count = max(last + 1, min(_KEPT, self._examples))
        read = self._first
        if read is None or last >= _KEPT:
            read = next(self.made(0).batch(count).as_numpy_iterator(), None)
        if read is None or len(next(_leaves(read))) <= last:
            raise UsageError(f"a Dataset of examples={self._examples} has no example {last}")
        if count <= _KEPT:
            self._first = read
        x, y = _map(lambda array: array[indices], read)
        return x, y

    def made(self, epoch: int) -> Any:
        """The tf.data.Dataset of an epoch.

        Raises:
          UsageError: it is something else.
        """
        dataset = self._make(epoch) if self._takes_epoch else self._make()
        spec = getattr(dataset, "element_spec", None)
        if not (isinstance(spec, tuple) and len(spec) == 2):
            raise UsageError(
                f"a Dataset's function gave {type(dataset).__name__} of {spec}; it must give a"
                " tf.data.Dataset of (x, y)"
            )
        return dataset

    def blocks(self, epoch: int, size: int, skip: int = 0) -> Iterator[tuple[Tree, Tree]]:
        """The examples of an epoch from `skip` on, as (x, y) of arrays [size, …], the last shorter.

        Raises:
          RunError: the epoch has more or fewer examples than were announced.
        """
        count, held = skip, None
        for block in self.made(epoch).skip(skip).batch(size).as_numpy_iterator():
            count += len(next(_leaves(block)))
            if count > self._examples:
                break
            if held is not None:
                yield held
            held = block
        if count != self._examples:
            word = "more" if count > self._examples else f"only {count}"
            raise RunError(
                f"a Dataset of examples={self._examples} gave {word} in epoch {epoch}; give the"
                " number that each epoch has (single ones, not batches), or use take or repeat in"
                " its function"
            )
        if held is not None:
            yield held


# Enough rows to notice another file or another order, few enough for one that fills a disk.
_DIGEST_ROWS = 2048


def digest(source: Source) -> int:
    """A 32-bit checksum of the examples, to compare between workers.

    Arrays in memory are read whole; of anything else the length and up to 2,048 examples, evenly
    spaced, are; of a Dataset its first ones.
    """
    if isinstance(source, Arrays) and source.in_memory:
        return checksum(len(source), (source.x, source.y))
    return checksum(len(source), source[spaced(source, _DIGEST_ROWS)])


def checksum(count: int, some: Tree) -> int:
    """32 bits, of a number of examples and some of them."""
    found = zlib.crc32(str(count).encode())
    for array in _leaves(some):
        array = np.ascontiguousarray(array)
        found = zlib.crc32(f"{array.dtype}{array.shape}".encode(), found)
        is_text = array.dtype.hasobject  # strings of any length
        data = repr(array.tolist()).encode() if is_text else array.reshape(-1).view(np.uint8).data
        found = zlib.crc32(data, found)
    return found


def spaced(source: Source, most: int) -> np.ndarray:
    """[n] int64 indices, n <= most, evenly spaced; of a Dataset those of its first examples."""
    if isinstance(source, Dataset):
        return np.arange(min(len(source), most))
    return np.unique(np.linspace(0, len(source) - 1, most).astype(np.int64))


def _as_array(value: Any) -> np.ndarray:
    try:
        array = value if isinstance(value, np.ndarray) else np.asarray(value)
    except ValueError as error:  # numpy's words for a ragged list
        raise UsageError(
            f"a {type(value).__name__} is no array ({error}); give all examples the same shape"
        ) from error
    if array.dtype.hasobject:
        raise UsageError("an array holds Python objects; give it a number or string dtype")
    if array.dtype.kind in "mMV":
        raise UsageError(f"an array is of {array.dtype}; give it a number or string dtype")
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
