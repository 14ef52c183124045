"""Reading pictures and labels: IDX files (plain or .gz) and .npz archives.

The IDX format: two zero bytes, a byte for the type (8: uint8), a byte for the number of axes, a
big-endian uint32 per axis, then the data (http://yann.lecun.com/exdb/mnist/).
"""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from dist_train.errors import UsageError

Split = tuple[np.ndarray, np.ndarray]  # ([n, 28, 28] uint8 pictures, [n] uint8 labels)

_EMBEDDED = Path(__file__).parent
_IDX_FILES = (
    ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
)
_CLASSES = 10
_SIDE = 28


def read(data_dir: str | None) -> tuple[Split, Split]:
    """(train, test) from a folder of IDX files, an .npz, or the copy inside the package.

    Raises:
      UsageError: a file is missing, damaged, or of another format; it is named.
    """
    path = Path(data_dir) if data_dir is not None else _EMBEDDED
    if path.suffix == ".npz":
        splits = _read_npz(path)
    elif path.is_dir():
        splits = _read_folder(path)
    else:
        raise UsageError(
            f"data_dir={path} is neither a folder with the four IDX files nor an .npz file"
        )
    for name, (x, y) in zip(("training", "test"), splits, strict=True):
        _check(path, name, x, y)
    return splits


def _read_folder(folder: Path) -> tuple[Split, Split]:
    train, test = (
        (read_idx(_find(folder, images), axes=3), read_idx(_find(folder, labels), axes=1))
        for images, labels in _IDX_FILES
    )
    return train, test


def _find(folder: Path, stem: str) -> Path:
    for name in (stem, stem.replace("-idx", ".idx")):  # both spellings are around
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    raise UsageError(f"data_dir={folder} has neither {stem} nor {stem}.gz")


def read_idx(path: Path, *, axes: int) -> np.ndarray:
    """The uint8 array of an IDX file with `axes` axes; read-only, as its bytes are.

    Raises:
      UsageError: the file is not what its name says.
    """
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":  # by content: a .gz that was unpacked in place keeps its name
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    magic = bytes((0, 0, 8, axes))
    if raw[:4] != magic:
        raise UsageError(
            f"{path} starts with {raw[:4].hex() or 'nothing'}, not with {magic.hex()}: it is no"
            f" IDX file of uint8 with {axes} axes"
        )
    header = 4 + 4 * axes
    if len(raw) < header:
        raise UsageError(f"{path} ends within its header, after {len(raw)} bytes; copy it again")
    shape = struct.unpack(f">{axes}I", raw[4:header])
    if len(raw) - header != math.prod(shape):
        raise UsageError(
            f"{path} has {len(raw) - header} bytes of data where its header says"
            f" {' x '.join(map(str, shape))} = {math.prod(shape)}; copy it again"
        )
    try:
        return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)
    except ValueError as error:  # no data, and axes whose product no machine can address
        raise UsageError(f"{path} has the shape {list(shape)}: {error}") from error


def _read_npz(path: Path) -> tuple[Split, Split]:
    names = ("x_train", "y_train", "x_test", "y_test")
    arrays = {}
    try:
        # Never unpickle: an object array could run code.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            for name in names:
                if name not in archive:
                    raise UsageError(
                        f"{path} has no array {name!r}; it must hold {', '.join(names)}"
                    )
                arrays[name] = archive[name]
                if not isinstance(arrays[name], np.ndarray):  # numpy hands out foreign bytes
                    raise UsageError(f"{path}: {name} is no array in numpy's format")
    except FileNotFoundError:
        raise UsageError(f"data_dir={path} does not exist") from None
    except UsageError:
        raise
    except Exception as error:  # numpy and zipfile raise a dozen kinds at damaged bytes
        reason = str(error) or type(error).__name__
        if "allow_pickle" in reason:
            reason = "object arrays are refused"
        raise UsageError(f"{path} cannot be read as an .npz: {reason.splitlines()[0]}") from error
    return (arrays["x_train"], arrays["y_train"]), (arrays["x_test"], arrays["y_test"])


def _check(path: Path, name: str, x: np.ndarray, y: np.ndarray) -> None:
    if x.dtype != np.uint8 or x.shape[1:] != (_SIDE, _SIDE):
        raise UsageError(
            f"{path}: {name} pictures are {x.dtype} {list(x.shape)}; they must be uint8"
            f" [examples, {_SIDE}, {_SIDE}]"
        )
    if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer):
        raise UsageError(
            f"{path}: {name} labels are {y.dtype} {list(y.shape)}; they must be integers [examples]"
        )
    if len(x) != len(y):
        raise UsageError(f"{path}: {len(x)} {name} pictures but {len(y)} labels")
    if len(x) == 0:
        raise UsageError(f"{path}: no {name} examples")
    if y.min() < 0 or y.max() >= _CLASSES:
        worst = int(y.max()) if y.max() >= _CLASSES else int(y.min())
        raise UsageError(f"{path}: a {name} label is {worst}; labels must be 0 to {_CLASSES - 1}")
