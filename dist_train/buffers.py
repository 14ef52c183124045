"""Buffers: memory that examples are read into again and again.

A chunk of streamed examples is some 30 MiB. In fresh memory the kernel clears each page first, and
TensorFlow copies an array that is not aligned; both together take longer than the reading.
"""

import threading
import weakref

import numpy as np

# What TensorFlow and XLA ask of memory that they take as it is.
_ALIGNMENT_BYTES = 64
# The kinds of dtypes that TensorFlow takes as they are; of strings it makes its own.
_NUMBERS = "biufc"


class Buffers:
    """As many buffers as are in use at a time.

    An array from here is a view, and holds its buffer until its last reference is gone,
    TensorFlow's included. Its bytes are in the machine's own order: TensorFlow does not look.
    """

    def __init__(self) -> None:
        self._buffers: list[_Buffer] = []
        self._lock = threading.Lock()

    def take(self, array: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """array[rows], for rows ≥ 0 that exist."""
        is_plain = array.flags.c_contiguous and array.flags.aligned  # else `take` copies all of it
        if array.dtype.kind not in _NUMBERS or not array.dtype.isnative or not is_plain:
            return self.copy(array[rows])
        target = self._empty((len(rows), *array.shape[1:]), array.dtype)
        # In another mode it would take a copy first.
        return np.take(array, rows, axis=0, out=target, mode="clip")

    def copy(self, array: np.ndarray) -> np.ndarray:
        """A copy, contiguous; of strings and objects the array itself."""
        if array.dtype.kind not in _NUMBERS:
            return array
        target = self._empty(array.shape, array.dtype.newbyteorder("="))
        np.copyto(target, array)
        return target

    def _empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        with self._lock:
            idle = (each for each in self._buffers if each.size == size and each.is_idle)
            if (buffer := next(idle, None)) is None:
                buffer = _Buffer(size)
                self._buffers.append(buffer)
            return buffer.lend().view(dtype).reshape(shape)


class _Buffer:
    """Memory that one array at a time looks at."""

    def __init__(self, size: int):
        self.size = size
        self._memory = np.empty(size + _ALIGNMENT_BYTES, np.uint8)
        self._begin = -self._memory.ctypes.data % _ALIGNMENT_BYTES
        self._lent: weakref.ref[np.ndarray] | None = None

    @property
    def is_idle(self) -> bool:
        return self._lent is None or self._lent() is None

    def lend(self) -> np.ndarray:
        """All of it, [size] uint8: the array that every view of it will hold."""
        # Of a slice a view would hold the memory instead, as if the slice were not there.
        array = np.frombuffer(self._memory.data, np.uint8, self.size, self._begin)
        self._lent = weakref.ref(array)
        return array
