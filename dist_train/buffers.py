"""Buffers: memory that examples are read into again and again.

A chunk of streamed examples is some 30 MiB. In fresh memory the kernel clears each page first, and
TensorFlow copies an array that is not aligned; both together take longer than the reading.
"""

import sys
import threading

import numpy as np

# What TensorFlow and XLA ask of memory that they take as it is.
_ALIGNMENT_BYTES = 64
# The kinds of dtypes that TensorFlow takes as they are; of strings it makes its own.
_NUMBERS = "biufc"
# Of a buffer that nobody uses: the list, the loop's variable and the call's argument.
_IDLE_REFERENCES = 3


class Buffers:
    """As many buffers as are in use at a time.

    An array from here is a view, and holds its buffer until its last reference is gone,
    TensorFlow's included.
    """

    def __init__(self) -> None:
        self._buffers: list[np.ndarray] = []
        self._lock = threading.Lock()

    def take(self, array: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """array[rows], for rows ≥ 0 that exist."""
        if array.dtype.kind not in _NUMBERS:
            return array[rows]
        target = self._empty((len(rows), *array.shape[1:]), array.dtype)
        # In another mode it would take a copy first.
        return np.take(array, rows, axis=0, out=target, mode="clip")

    def copy(self, array: np.ndarray) -> np.ndarray:
        """A copy, contiguous; of strings and objects the array itself."""
        if array.dtype.kind not in _NUMBERS:
            return array
        target = self._empty(array.shape, array.dtype)
        np.copyto(target, array)
        return target

    def _empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        buffer = self._idle(size + _ALIGNMENT_BYTES)
        begin = -buffer.ctypes.data % _ALIGNMENT_BYTES
        return buffer[begin : begin + size].view(dtype).reshape(shape)

    def _idle(self, size: int) -> np.ndarray:
        with self._lock:
            for buffer in self._buffers:
                if len(buffer) == size and sys.getrefcount(buffer) == _IDLE_REFERENCES:
                    return buffer
            self._buffers.append(np.empty(size, np.uint8))
            return self._buffers[-1]
