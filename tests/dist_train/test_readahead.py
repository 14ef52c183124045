"""Readahead: what the kernel has read when, of a file that was not in the page cache."""

import ctypes
import mmap
import os
import resource
import time

import numpy as np
import pytest

from dist_train.readahead import Readahead

ROWS, ROW_BYTES = 64, 48 << 10


@pytest.fixture
def path(tmp_path):
    """A file of ROWS rows, which is not in the page cache."""
    path = tmp_path / "rows.raw"
    path.write_bytes(np.random.default_rng(0).bytes(ROWS * ROW_BYTES))
    evict(path)
    if cached(path):
        pytest.skip("this file system keeps files in memory")
    return path


def evict(path):
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached(path):
    """The rows whose pages are all in the page cache."""
    array = np.memmap(path, np.uint8, "r")
    pages = np.zeros(-(-array.size // mmap.PAGESIZE), np.uint8)
    mincore = ctypes.CDLL(None, use_errno=True).mincore
    mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    assert mincore(array.ctypes.data, array.size, pages.ctypes.data) == 0
    there = np.repeat(pages & 1, mmap.PAGESIZE)[: array.size].reshape(ROWS, ROW_BYTES)
    return set(np.flatnonzero(there.all(axis=1)).tolist())


def mapped(path):
    return np.memmap(path, np.uint8, "r").reshape(ROWS, ROW_BYTES)


@pytest.fixture
def advised(monkeypatch):
    """The rows of each advice."""
    advise, found = Readahead._advise, []

    def recorded(self, rows):
        found.append(rows.tolist())
        advise(self, rows)

    monkeypatch.setattr(Readahead, "_advise", recorded)
    return found


def soon(holds, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    return holds()


@pytest.mark.parametrize(("every", "rows"), [(1, [40, 7, 8, 7, 23]), (4, [9, 1, 3])])
def test_the_rows_come_before_they_are_read_and_no_others_do(path, every, rows):
    array = mapped(path)[::every]
    wanted = {row * every for row in rows}
    with Readahead(array).reading(np.array(rows)):
        assert soon(lambda: wanted <= cached(path))
        # Rows are whole pages here.
        assert ROW_BYTES % mmap.PAGESIZE or cached(path) == wanted


def blocks():
    return resource.getrusage(resource.RUSAGE_THREAD).ru_inblock


def test_advice_ends_when_all_is_there_and_begins_when_something_is_missing(path, advised):
    before = blocks()
    path.read_bytes()
    if blocks() == before:
        pytest.skip("this file system does not count what is read")
    evict(path)
    array = mapped(path)
    readahead = Readahead(array)

    def read(*rows):
        with readahead.reading(np.array(rows)):
            array[list(rows)].sum()

    read(0, 1, 2)
    read(0, 1, 2)
    assert advised == [[0, 1, 2]] * 2
    read(2, 1)
    assert advised == [[0, 1, 2]] * 2
    read(60, 2)
    assert advised == [[0, 1, 2]] * 2
    read(5, 30)
    assert advised[2:] == [[5, 30]]


def test_advice_goes_on_where_the_kernel_does_not_count_blocks(tmp_path, monkeypatch, advised):
    counts = {"ru_inblock": 0, "ru_majflt": 0}

    def usage(who):
        return type("Usage", (), dict(counts))

    monkeypatch.setattr("dist_train.readahead.resource.getrusage", usage)
    array = np.memmap(tmp_path / "rows", np.uint8, "w+", shape=(ROWS, ROW_BYTES))
    readahead = Readahead(array)
    for faults in (0, 1, 0, 0, 0):  # of the second: it was not advised, and something was missing
        with readahead.reading(np.array([1, 2])):
            counts["ru_majflt"] += faults
    assert len(advised) == 4


@pytest.mark.parametrize(
    "array", [np.zeros((8, 3)), np.zeros(8, "S3"), np.asfortranarray(np.zeros((8, 3)))]
)
def test_nothing_is_advised_of_arrays_in_memory(array, advised):
    with Readahead(array).reading(np.array([3, 1])):
        pass
    assert advised == []


def test_rows_that_lie_in_pieces_or_backwards_are_read_without(path, advised):
    array = mapped(path)
    for view in (array[:, ::2], array.T, array[::-1], array[:, :0]):
        with Readahead(view).reading(np.array([3, 1])):
            np.testing.assert_array_equal(view[[3, 1]], np.asarray(view)[[3, 1]])
    assert advised == []


def test_pages_of_neighbouring_rows_are_one_run(path):
    array = np.memmap(path, np.int32, "r")
    rows = np.append(np.arange(0, 3 * mmap.PAGESIZE // 4, 100), 5 * mmap.PAGESIZE // 4)
    begins, ends = Readahead(array)._runs(rows[::-1])
    assert ((begins - array.ctypes.data) / mmap.PAGESIZE).tolist() == [0, 5]
    assert ((ends - array.ctypes.data) / mmap.PAGESIZE).tolist() == [3, 6]


def test_small_rows_in_random_order_are_left_to_the_kernel(path):
    array = np.memmap(path, np.uint8, "r").reshape(-1, 512)
    with Readahead(array).reading(np.arange(0, len(array), 40)):
        assert not soon(lambda: cached(path), seconds=0.2)
    with Readahead(array).reading(np.arange(len(array))):
        assert soon(lambda: len(cached(path)) == ROWS)
