"""Readahead: the kernel is told which rows of a mapped file are about to be read.

Otherwise each row that is not in the page cache is a fault, which waits for the disk by itself and
has it read what lies around the row: pictures of 48 KiB in random order came at 0.12 GB/s from a
disk that gives 1.45 GB/s, and come at 1.38.
"""

import contextlib
import ctypes
import math
import mmap
import resource
from collections.abc import Iterator

import numpy as np

# For one advice Linux reads no more than the disk's own setting, of which this is the usual one.
_PIECE_BYTES = 128 << 10
# Shorter runs are left to the kernel: what it reads around a small row is soon asked for as well,
# unless the file is larger than memory.
_LEAST_RUN_BYTES = 8 << 10


class Readahead:
    """Tells the kernel of the rows of one array.

    Advice takes a microsecond a row, in vain where all is in the page cache. So it is given for as
    long as there is something to read, by the kernel's own counts for the thread that reads.

    Args:
      array: [n, …]; nothing is done unless it is mapped, and its rows are contiguous.
    """

    def __init__(self, array: np.ndarray):
        self._address, self._stride = array.ctypes.data, array.strides[0]
        self._row_bytes = array.itemsize * math.prod(array.shape[1:])
        self._is_cold = True
        self._counts_blocks = True
        self._advises = (
            isinstance(array, np.memmap)
            and array[:1].flags.c_contiguous
            and self._stride >= self._row_bytes > 0
            and hasattr(mmap, "MADV_WILLNEED")
            and hasattr(resource, "RUSAGE_THREAD")
        )

    @contextlib.contextmanager
    def reading(self, rows: np.ndarray) -> Iterator[None]:
        """Around the reading of the rows, [m] integers, by this thread."""
        if not self._advises:
            yield
            return
        blocks = _usage().ru_inblock
        if self._is_cold:
            self._advise(rows)
        faults = _usage().ru_majflt
        yield
        missed = _usage().ru_majflt > faults
        was_read = _usage().ru_inblock > blocks
        if missed and not was_read:  # not all file systems count
            self._counts_blocks = False
        self._is_cold = missed or was_read or (self._is_cold and not self._counts_blocks)

    def _advise(self, rows: np.ndarray) -> None:
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        begins, ends = self._runs(rows)
        if np.mean(ends - begins) < _LEAST_RUN_BYTES:
            return
        for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
            for piece in range(begin, end, _PIECE_BYTES):
                # Advice only: where it is not taken, the rows are read all the same.
                madvise(piece, min(_PIECE_BYTES, end - piece), mmap.MADV_WILLNEED)

    def _runs(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Begins and ends of the runs of pages that the rows lie in, in rising order."""
        addresses = self._address + np.sort(rows).astype(np.int64) * self._stride
        begins = addresses // mmap.PAGESIZE * mmap.PAGESIZE
        ends = -(-(addresses + self._row_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE
        is_apart = begins[1:] > ends[:-1]  # from the pages of the row before
        return begins[np.append(True, is_apart)], ends[np.append(is_apart, True)]


def _usage() -> "resource.struct_rusage":
    return resource.getrusage(resource.RUSAGE_THREAD)
