"""How fast examples come from a file, beside a plain read of the same bytes.

    python tests/benchmarks/streaming.py [--gib=2]

The file has pictures of 48 KiB and is a numpy.memmap; the model looks at a corner of each, so that
the input is all there is to wait for. Cold: the file is not in the page cache, and the plain read
is from its begin to its end. Warm: it is, and the plain read is a copy from the mapped memory. Each
has a process of its own, since what a process has mapped does not leave the page cache. One table
of medians over interleaved rounds.
"""

import argparse
import functools
import json
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import dist_train  # noqa: E402

SHAPE = (128, 128, 3)
_PICTURE_BYTES = int(np.prod(SHAPE))
_BATCH = 64
_BLOCK_PICTURES = 512  # 24 MiB
_ROUNDS = 5
_GOAL = 0.8


def write(path: Path, count: int) -> None:
    """A file of so many pictures, all bytes different enough to be stored."""
    block = np.random.default_rng(0).integers(0, 256, (_BLOCK_PICTURES, *SHAPE), np.uint8)
    with path.open("wb") as file:
        for begin in range(0, count, _BLOCK_PICTURES):
            file.write(block[: count - begin].data)
        file.flush()
        os.fsync(file.fileno())


def evict(path: Path) -> None:
    """Out of the page cache.

    Raises:
      RuntimeError: it is still there: somebody has mapped it, or it is in a file system in memory.
    """
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            os.preadv(file.fileno(), [bytearray(1)], path.stat().st_size // 2, os.RWF_NOWAIT)
        except BlockingIOError:
            return
    raise RuntimeError(f"{path} does not leave the page cache")


def pictures(path: Path) -> np.memmap:
    return np.memmap(path, np.uint8, "r").reshape(-1, *SHAPE)


def read(path: Path) -> float:
    """Seconds of a read from begin to end."""
    buffer = memoryview(bytearray(_BLOCK_PICTURES * _PICTURE_BYTES))
    begin = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - begin


def copy(path: Path) -> float:
    """Seconds of a copy of all that is mapped, block by block to the same place."""
    mapped = pictures(path)
    target = np.empty((_BLOCK_PICTURES, *SHAPE), np.uint8)
    begin = time.perf_counter()
    for start in range(0, len(mapped), _BLOCK_PICTURES):
        block = mapped[start : start + _BLOCK_PICTURES]
        np.copyto(target[: len(block)], block)
    return time.perf_counter() - begin


def train(path: Path, *, shuffle: bool, every: int = 1) -> float:
    """Seconds that dist_train takes for as many pictures as the file has, once it is compiled.

    Args:
      every: of so many pictures only the first one is of the examples.
    """
    import keras
    import tensorflow as tf

    def model():
        return keras.Sequential(
            [keras.Input((8, 8)), keras.layers.Flatten(), keras.layers.Dense(10)]
        )

    mapped = pictures(path)[::every]
    labels = np.zeros(len(mapped), np.int32)
    task = dist_train.Task(
        model=model,
        train=dist_train.Arrays(mapped, labels),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        preprocess=lambda x, y, seed: (tf.cast(x[:, :8, :8, 0], tf.float32) / 255.0, y),
    )
    with tempfile.TemporaryDirectory() as folder:
        config = dist_train.Config(
            workdir=f"{folder}/run", epochs=1, batch_size=_BATCH, shuffle=shuffle, log_steps=32
        )
        dist_train.train(task, config)
        lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["kind"] == "train"]
    # From the second line on: what was read while the step was compiled is used up by then.
    first, last = rows[1], rows[-1]
    rate = (last["examples"] - first["examples"]) / (last["time"] - first["time"])
    return every * len(mapped) / rate


def alone(measure: Callable[[Path], float], path: Path) -> float:
    """What it measures in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, path).result()


def main() -> None:
    """Prints the table, as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=2.0, help="size of the file; default: 2")
    gib = parser.parse_args().gib
    if gib < 1:
        parser.error(f"--gib={gib:g}: of less than 1 there are too few lines to time")
    count = int(gib * 2**30) // _PICTURE_BYTES
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    ways: dict[str, tuple[bool, Callable[[Path], float]]] = {  # name: (cold?, seconds)
        "plain read": (True, read),
        "in order, cold": (True, functools.partial(train, shuffle=False)),
        # As of a file that does not fit in memory: what is read around a picture is in vain.
        "shuffled, cold": (True, functools.partial(train, shuffle=True, every=4)),
        "plain copy": (False, copy),
        "in order, warm": (False, functools.partial(train, shuffle=False)),
        "shuffled, warm": (False, functools.partial(train, shuffle=True)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "pictures.raw")
        write(path, count)
        for _ in range(_ROUNDS):
            for name, (cold, measure) in ways.items():
                read(path)
                if cold:
                    evict(path)
                seconds[name].append(alone(measure, path))
                print(f"{name}: {seconds[name][-1]:.2f} s", file=sys.stderr, flush=True)
    print("| examples from a file | MB/s | of the plain way | goal |\n|---|---|---|---|")
    plain: list[float] = []
    for name in ways:
        megabytes = count * _PICTURE_BYTES / 1e6 / statistics.median(seconds[name])
        ratio = goal = ""
        if name.startswith("plain"):
            plain = seconds[name]
        else:
            pairs = zip(plain, seconds[name], strict=True)
            ratio = f"{statistics.median(theirs / ours for theirs, ours in pairs):.2f}"
            goal = f"≥ {_GOAL:g}"
        print(f"| {name} | {megabytes:,.0f} | {ratio} | {goal} |")


if __name__ == "__main__":
    main()
