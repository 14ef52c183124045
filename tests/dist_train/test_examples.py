import numpy as np
import pytest

from dist_train import Arrays, Source, UsageError
from dist_train.examples import digest

_X = np.arange(12, dtype=np.float32).reshape(4, 3)
_Y = np.array([3, 1, 2, 0])


class _Reader:
    """The rows of arrays, read at random; counts what it was asked for."""

    def __init__(self, x, y):
        self.x, self.y = x, y
        self.asked = []

    def __len__(self):
        return len(self.x)

    def __getitem__(self, indices):
        self.asked.append(indices)
        return self.x[indices], self.y[indices]


def test_rows_are_taken_in_the_order_of_the_indices():
    x, y = Arrays(_X, _Y)[np.array([2, 0, 2])]
    assert x.tolist() == [[6, 7, 8], [0, 1, 2], [6, 7, 8]]
    assert y.tolist() == [2, 3, 2]


def test_dicts_and_tuples_keep_their_shape():
    arrays = Arrays({"a": _X, "b": (_Y, _X)}, (_Y,))
    assert len(arrays) == 4
    assert [a.shape for a in arrays.arrays()] == [(4, 3), (4,), (4, 3), (4,)]
    assert arrays.nbytes == 2 * _X.nbytes + 2 * _Y.nbytes
    x, y = arrays[np.array([1])]
    assert x["b"][1].tolist() == [[3, 4, 5]]
    assert y[0].tolist() == [1]


def test_a_list_is_data():
    arrays = Arrays([[1, 2], [3, 4]], [0, 1])
    assert arrays.x.tolist() == [[1, 2], [3, 4]]


def test_arrays_are_not_copied():
    assert Arrays(_X, _Y).x is _X


def test_arrays_and_readers_are_sources():
    assert isinstance(Arrays(_X, _Y), Source)
    assert isinstance(_Reader(_X, _Y), Source)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (_X, _Y[:3], r"arrays of \[3, 4\] examples; x and y must have the same length"),
        ({"a": _X, "b": _X[:2]}, _Y, r"arrays of \[2, 4\] examples"),
        ({}, (), r"arrays of \[\] examples"),
        (_X, np.array([1, None, 2, 3]), "Python objects"),
        (_X, [object()] * 4, "Python objects"),
        (_X, None, "Python objects"),
        (_X, _Y.astype("datetime64[s]"), "an array is of datetime64"),
        (_X, 3, "no axis of examples"),
        ([[1, 2], [3]], [0, 1], "a list is no array .*give all examples the same shape"),
        ([np.zeros(2), np.zeros(3)], [0, 1], "a list is no array"),
        ([], [], r"an array of shape \[0\] holds nothing"),
        (_X[:0], _Y[:0], r"an array of shape \[0, 3\] holds nothing"),
        (np.zeros((4, 0)), _Y, r"an array of shape \[4, 0\] holds nothing"),
        ([[], []], [0, 1], r"an array of shape \[2, 0\] holds nothing"),
        (_X, np.zeros((4, 2, 0)), r"an array of shape \[4, 2, 0\] holds nothing"),
    ],
)
def test_what_is_no_array_of_examples_is_an_error(x, y, message):
    with pytest.raises(UsageError, match=message) as caught:
        Arrays(x, y)
    assert len(str(caught.value).splitlines()) == 1


def test_a_file_is_not_in_memory(tmp_path):
    x = np.memmap(tmp_path / "x", np.float32, "w+", shape=_X.shape)
    x[:] = _X
    assert Arrays(_X, _Y).in_memory
    assert not Arrays(x, _Y).in_memory
    assert not Arrays({"x": (x,)}, _Y).in_memory
    np.testing.assert_array_equal(Arrays(x, _Y)[np.array([3, 1])][0], _X[[3, 1]])


def test_equal_examples_have_equal_digests():
    assert digest(Arrays(_X, _Y)) == digest(Arrays(_X.copy(), _Y.copy()))
    assert digest(Arrays(np.asfortranarray(_X), _Y)) == digest(Arrays(_X, _Y))


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (_X + np.eye(4, 3, dtype=np.float32), _Y),
        (_X, _Y[::-1]),
        (_X.astype(np.float64), _Y),
        (_X.reshape(4, 3, 1), _Y),
        (_X[:3], _Y[:3]),
        ((_X, _Y), _Y),
    ],
)
def test_other_examples_have_other_digests(x, y):
    assert digest(Arrays(x, y)) != digest(Arrays(_X, _Y))


def test_one_bit_among_many_changes_the_digest():
    x = np.zeros((70_000, 28), np.uint8)
    before = digest(Arrays(x, x[:, 0]))
    x[33_333, 13] = 1
    assert digest(Arrays(x, x[:, 0])) != before


@pytest.mark.parametrize("dtype", ["S3", "U3", ">i4", "bool", "complex64"])
def test_arrays_of_any_dtype_have_a_digest(dtype):
    one = np.array([1, 0, 1]).astype("int64").astype(dtype)
    other = np.array([1, 1, 1]).astype("int64").astype(dtype)
    assert digest(Arrays(one, one)) != digest(Arrays(other, other))


@pytest.mark.parametrize("examples", [1, 2, 2048, 2049, 100_000])
def test_a_large_source_is_sampled_from_end_to_end(examples):
    reader = _Reader(np.arange(examples), np.zeros(examples))
    before = digest(reader)
    (rows,) = reader.asked
    assert rows.dtype == np.int64
    assert len(rows) == len(set(rows.tolist())) == min(examples, 2048)
    assert (rows[0], rows[-1]) == (0, examples - 1)
    reader.x[-1] += 1
    assert digest(reader) != before
