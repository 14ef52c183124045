import gzip
import hashlib
import io
import math
import re
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_train import UsageError
from dist_train.mnist import files

_NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_FUZZ = settings(max_examples=100)


def _idx(array: np.ndarray) -> bytes:
    head = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.astype(np.uint8).tobytes()


def _split(examples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    x = random.integers(0, 256, (examples, 28, 28), np.uint8)
    return x, random.integers(0, 10, examples).astype(np.uint8)


def _arrays() -> dict[str, np.ndarray]:
    (x, y), (x_test, y_test) = _split(7, 1), _split(3, 2)
    return {"x_train": x, "y_train": y, "x_test": x_test, "y_test": y_test}


def _folder(path: Path, **replaced: np.ndarray) -> Path:
    arrays = _arrays() | replaced
    path.mkdir(exist_ok=True)
    for name, key in zip(_NAMES, ("x_train", "y_train", "x_test", "y_test"), strict=True):
        (path / name).write_bytes(_idx(arrays[key]))
    return path


def _npz(path: Path, **replaced: np.ndarray | None) -> str:
    arrays = {k: v for k, v in (_arrays() | replaced).items() if v is not None}
    np.savez(path / "data.npz", **arrays)
    return str(path / "data.npz")


def _outcome(read, *args, **options):
    """What `read` returns, or its UsageError."""
    try:
        return read(*args, **options)
    except UsageError as error:
        return error


def _equals_made(splits) -> bool:
    (x, y), (x_test, y_test) = splits
    read = {"x_train": x, "y_train": y, "x_test": x_test, "y_test": y_test}
    return all(np.array_equal(read[name], array) for name, array in _arrays().items())


@pytest.mark.parametrize(
    ("name", "md5"),
    zip(
        _NAMES,
        (
            "6bbc9ace898e44ae57da46a324031adb",
            "a25bea736e30d166cdddb491f175f624",
            "2646ac647ad5339dbf082846283269ea",
            "27ae3e4e09519cfbb04c329615203637",
        ),
        strict=True,
    ),
)
def test_embedded_file_has_the_md5_of_the_original(name, md5):
    raw = gzip.decompress((Path(files.__file__).parent / f"{name}.gz").read_bytes())
    assert hashlib.md5(raw).hexdigest() == md5


def test_embedded_data_are_mnist():
    (x, y), (x_test, y_test) = files.read(None)
    assert (x.shape, x_test.shape) == ((60_000, 28, 28), (10_000, 28, 28))
    assert {array.dtype for array in (x, y, x_test, y_test)} == {np.dtype(np.uint8)}
    assert y[:8].tolist() == [5, 0, 4, 1, 9, 2, 1, 3]
    assert y_test[:8].tolist() == [7, 2, 1, 0, 4, 1, 4, 9]
    assert np.bincount(y).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]


def test_plain_folder_is_read(tmp_path):
    assert _equals_made(files.read(str(_folder(tmp_path / "data"))))


def test_gz_folder_is_read(tmp_path):
    folder = _folder(tmp_path / "data")
    for path in list(folder.iterdir()):
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert _equals_made(files.read(str(folder)))


def test_dotted_names_are_read(tmp_path):
    folder = _folder(tmp_path / "data")
    for path in list(folder.iterdir()):
        path.rename(folder / path.name.replace("-idx", ".idx"))
    assert _equals_made(files.read(str(folder)))


def test_gz_that_was_unpacked_in_place_is_read(tmp_path):
    folder = _folder(tmp_path / "data")
    for path in list(folder.iterdir()):
        path.rename(folder / f"{path.name}.gz")
    assert _equals_made(files.read(str(folder)))


def test_npz_is_read(tmp_path):
    assert _equals_made(files.read(_npz(tmp_path)))


def test_npz_labels_may_be_of_any_integer_type(tmp_path):
    labels = _arrays()["y_train"].astype(">i8")
    (_, y), _ = files.read(_npz(tmp_path, y_train=labels))
    assert y.tolist() == labels.tolist()


@pytest.mark.parametrize("name", _NAMES)
def test_missing_file_is_named(tmp_path, name):
    folder = _folder(tmp_path / "data")
    (folder / name).unlink()
    with pytest.raises(UsageError, match=f"neither {name} nor {name}.gz"):
        files.read(str(folder))


def _damaged(raw: bytes, how: str) -> bytes:
    return {
        "wrong magic": b"\x00\x00\x0d" + raw[3:],
        "wrong axes": b"\x00\x00\x08\x02" + raw[4:],
        "empty": b"",
        "within the header": raw[:6],
        "truncated": raw[:-1],
        "too long": raw + b"\0",
        "truncated gz": gzip.compress(raw)[:-9],
        "no gz": b"\x1f\x8b" + raw,
        "gz of nothing": gzip.compress(b""),
        "html": b"<!DOCTYPE html><title>404</title>",
    }[how]


@pytest.mark.parametrize("name", _NAMES)
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("wrong magic", "starts with 00000d0"),
        ("wrong axes", "starts with 00000802"),
        ("empty", "starts with nothing"),
        ("within the header", "ends within its header"),
        ("truncated", "copy it again"),
        ("too long", "copy it again"),
        ("truncated gz", "cannot be read"),
        ("no gz", "cannot be read"),
        ("gz of nothing", "starts with nothing"),
        ("html", "is no IDX file"),
    ],
)
def test_damaged_idx_is_named(tmp_path, name, how, message):
    folder = _folder(tmp_path / "data")
    (folder / name).write_bytes(_damaged((folder / name).read_bytes(), how))
    with pytest.raises(UsageError, match=f"{name} .*{message}") as caught:
        files.read(str(folder))
    assert len(str(caught.value).splitlines()) == 1


def test_shape_that_no_machine_can_address_is_an_error(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(bytes((0, 0, 8, 3)) + struct.pack(">3I", 0, 2**32 - 1, 2**32 - 1))
    with pytest.raises(UsageError, match=re.escape("[0, 4294967295, 4294967295]")):
        files.read_idx(path, axes=3)


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"y_train": np.zeros(6)}, "7 training pictures but 6 labels"),
        ({"y_test": np.zeros(4)}, "3 test pictures but 4 labels"),
        ({"y_train": np.full(7, 10)}, "a training label is 10; labels must be 0 to 9"),
        ({"x_test": np.zeros((3, 28, 27))}, r"test pictures are uint8 \[3, 28, 27\]"),
        ({"x_train": np.zeros((0, 28, 28)), "y_train": np.zeros(0)}, "no training examples"),
    ],
)
def test_idx_that_does_not_fit_is_an_error(tmp_path, replaced, message):
    folder = _folder(tmp_path / "data", **replaced)
    with pytest.raises(UsageError, match=message):
        files.read(str(folder))


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"x_test": None}, "has no array 'x_test'; it must hold x_train, y_train, x_test, y_test"),
        ({"y_train": np.array([1, None])}, "object arrays are refused"),
        ({"y_train": np.zeros(7, np.float32)}, "labels are float32"),
        ({"y_train": np.zeros((7, 1), np.int64)}, r"labels are int64 \[7, 1\]"),
        ({"y_train": np.full(7, -1)}, "a training label is -1"),
        ({"x_train": np.zeros((7, 28, 28), np.float32)}, "pictures are float32"),
        ({"x_train": np.uint8(0)}, r"pictures are uint8 \[\]"),
    ],
)
def test_npz_that_does_not_fit_is_an_error(tmp_path, replaced, message):
    path = _npz(tmp_path, **replaced)
    with pytest.raises(UsageError, match=message):
        files.read(path)


class _Bomb:
    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


def test_npz_is_never_unpickled(tmp_path):
    touched = tmp_path / "touched"
    path = _npz(tmp_path, y_test=np.array([_Bomb(str(touched))], object))
    np.load(path, allow_pickle=True)["y_test"]
    assert touched.exists()  # the bomb is live
    touched.unlink()
    with pytest.raises(UsageError, match="object arrays are refused"):
        files.read(path)
    assert not touched.exists()


def test_npy_that_is_called_npz_is_an_error(tmp_path):
    with (tmp_path / "data.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(UsageError, match=r"cannot be read as an .npz"):
        files.read(str(tmp_path / "data.npz"))


def test_npz_member_of_foreign_bytes_is_an_error(tmp_path):
    with zipfile.ZipFile(tmp_path / "data.npz", "w") as archive:
        archive.writestr("x_train", b"not an array")
    with pytest.raises(UsageError, match="x_train is no array"):
        files.read(str(tmp_path / "data.npz"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none", "neither a folder .* nor an .npz"),
        ("none.npz", "does not exist"),
        ("folder.npz", "cannot be read as an .npz: .*Is a directory"),
    ],
)
def test_wrong_path_is_an_error(tmp_path, name, message):
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(UsageError, match=message):
        files.read(str(tmp_path / name))


_TAILS = st.tuples(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.binary(max_size=130))


@_FUZZ
@given(
    raw=st.binary(max_size=60)
    | _TAILS.map(
        lambda tail: (
            bytes((0, 0, 8, len(tail[0]))) + struct.pack(f">{len(tail[0])}I", *tail[0]) + tail[1]
        )
    )
    | st.binary(max_size=40).map(lambda tail: b"\0\0\x08\x01" + tail)
    | st.binary(max_size=40).map(lambda tail: b"\x1f\x8b" + tail)
    | st.binary(max_size=40).map(gzip.compress),
    axes=st.sampled_from([1, 3]),
)
def test_any_bytes_are_the_idx_they_say_or_an_error(tmp_path, raw, axes):
    path = tmp_path / "file"
    path.write_bytes(raw)
    array = _outcome(files.read_idx, path, axes=axes)
    if isinstance(array, UsageError):
        assert str(path) in str(array)
        return
    plain = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    assert array.dtype == np.uint8
    assert array.ndim == axes
    assert math.prod(array.shape) == len(plain) - 4 - 4 * axes
    assert _idx(array) == plain


def _packed(compressed: bool) -> bytes:
    stream = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(stream, **_arrays())
    return stream.getvalue()


_PACKED = {compressed: _packed(compressed) for compressed in (False, True)}


@_FUZZ
@given(
    compressed=st.booleans(),
    changes=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=3),
    end=st.none() | st.integers(0, 2**16),
)
def test_a_changed_npz_is_read_as_it_was_or_is_an_error(tmp_path, compressed, changes, end):
    raw = bytearray(_PACKED[compressed])
    for position, value in changes:
        raw[position % len(raw)] = value
    path = tmp_path / "data.npz"
    path.write_bytes(raw if end is None else raw[: end % len(raw)])
    splits = _outcome(files.read, str(path))
    if isinstance(splits, UsageError):
        assert str(path) in str(splits)
        assert len(str(splits).splitlines()) == 1
    else:
        assert _equals_made(splits)


_ODD_HEADERS = st.sampled_from(
    [
        "{",
        "'",
        "[]",
        "(" * 100,
        "0L",
        "{1: 2, 'a': 3}",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (99999999999999999999999,)}",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (9999999999999999,)}",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (-2,)}",
        "{'descr': '|u1', 'fortran_order': 3, 'shape': ()}",
        "{'descr': ('|u1',), 'fortran_order': False, 'shape': (2,)}",
        "{'descr': [('a', '|u1')], 'fortran_order': False, 'shape': (2,)}",
    ]
)


@_FUZZ
@given(header=_ODD_HEADERS | st.text(max_size=40), version=st.integers(0, 4))
def test_an_npz_with_an_odd_header_is_an_error(tmp_path, header, version):
    text = header.encode().ljust(118) + b"\n"
    size = len(text).to_bytes(2 if version == 1 else 4, "little")
    path = tmp_path / "data.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for name in _arrays():
            member = b"\x93NUMPY" + bytes((version, 0)) + size + text + bytes(100)
            archive.writestr(f"{name}.npy", member)
    with pytest.raises(UsageError, match=re.escape(str(path))):
        files.read(str(path))
