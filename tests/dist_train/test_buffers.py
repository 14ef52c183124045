import threading
import tracemalloc

import numpy as np
import pytest
import tensorflow as tf

from dist_train.buffers import Buffers

PICTURES = np.arange(6 * 4 * 4, dtype=np.uint8).reshape(6, 4, 4)


@pytest.mark.parametrize("dtype", ["uint8", "float16", "int64", "complex128", "bool", ">i2", ">f8"])
def test_rows_are_those_of_numpy(dtype):
    array = PICTURES.astype(dtype)
    rows = np.array([5, 0, 0, 3])
    np.testing.assert_array_equal(Buffers().take(array, rows), array[rows])
    np.testing.assert_array_equal(Buffers().copy(array[::2, :, ::-1]), array[::2, :, ::-1])
    for found in (Buffers().take(array, rows), Buffers().copy(array)):
        assert found.dtype == array.dtype.newbyteorder("=")
        assert found.flags.c_contiguous
        assert found.ctypes.data % 64 == 0


WHOLE = np.arange(1 << 22, dtype=np.uint8).reshape(-1, 1 << 10)
UNALIGNED = WHOLE.reshape(-1)[1 : 1 - (1 << 10)].view(np.float32).reshape(-1, 1 << 8)


@pytest.mark.parametrize("part", [WHOLE[:, ::2], WHOLE[::3], UNALIGNED])
def test_rows_of_a_part_are_taken_without_a_copy_of_the_whole(part):
    rows = np.array([5, 1300])
    tracemalloc.start()
    try:
        found = Buffers().take(part, rows)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(found, part[rows])
    assert peak < part.nbytes // 10


@pytest.mark.parametrize("dtype", ["S5", "U5", object])
def test_strings_and_objects_are_left_to_tensorflow(dtype):
    words = np.array(["one", "two", "three"], dtype)
    assert Buffers().take(words, np.array([2, 0])).tolist() == words[[2, 0]].tolist()
    assert Buffers().copy(words) is words


def test_a_buffer_is_used_again_when_its_last_view_is_gone_and_not_before():
    buffers = Buffers()
    first = buffers.copy(PICTURES)
    address = first.ctypes.data
    part = first[1:, 2].view(np.int8)
    del first
    second = buffers.copy(PICTURES)
    assert second.ctypes.data != address
    del part
    assert buffers.copy(PICTURES).ctypes.data == address


def test_arrays_of_other_sizes_have_other_buffers():
    buffers = Buffers()
    assert buffers.copy(PICTURES).shape == PICTURES.shape
    assert buffers.copy(PICTURES[:0]).shape == (0, 4, 4)
    np.testing.assert_array_equal(buffers.copy(PICTURES[:5]), PICTURES[:5])


def test_tensors_that_share_a_buffer_keep_what_they_have():
    buffers = Buffers()
    shared = []

    def numbers(value):
        array = buffers.copy(np.full(1 << 16, value, np.int64))
        shared.append(array.ctypes.data)
        return array

    values = tf.data.Dataset.range(100).map(
        lambda value: tf.numpy_function(numbers, [value], tf.int64)
    )
    held = []
    for number, tensor in enumerate(values.prefetch(4)):
        held = [*held[-5:], (number, tensor)]
        for expected, tensor in held:
            assert np.unique(tensor.numpy()).tolist() == [expected]
    assert len(set(shared)) < 30  # they were used again


def test_threads_get_buffers_of_their_own():
    buffers, wrong = Buffers(), []

    def work(value):
        for _ in range(300):
            array = buffers.copy(np.full(1000, value))
            if not (array == value).all():
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
