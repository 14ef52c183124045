"""What a run takes of the machine does not grow with its length, nor with the number of runs."""

import os
import time
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import dist_train

X = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)


def held():
    """(file descriptors, threads, MiB of memory) of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return (
        len(os.listdir("/proc/self/fd")),
        len(os.listdir("/proc/self/task")),
        pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
    )


def train(workdir, seen=None, **settings):
    """A run of a tiny model; `seen` gets what is held at each 500th call of the step."""
    calls = [0]

    def count():
        calls[0] += 1
        if calls[0] % 500 == 0:
            seen.append(held())

    def preprocess(x, y, seed):
        if seed is not None and seen is not None:
            tf.py_function(count, [], [])
        return x, y

    task = dist_train.Task(
        model=lambda: keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]),
        train=dist_train.Arrays(X, (X.sum(axis=1) > 0).astype(np.int32)),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        preprocess=preprocess,
    )
    config = dist_train.Config(workdir=str(workdir), jit_compile="false", **settings)
    return dist_train.train(task, config)


@pytest.mark.slow
def test_ten_thousand_calls_of_the_loop_with_a_save_every_hundred_hold_no_more(tmp_path):
    seen = []
    result = train(
        tmp_path, seen, batch_size=16, epochs=2500, steps_per_loop=1, log_steps=50,
        checkpoint_steps=100,
    )  # fmt: skip
    assert result.step == 10_000
    files, threads, memory = zip(*seen, strict=True)
    # Of the first tenth the caches fill; a leak of 4 KiB a call would be 35 MiB.
    assert max(files[2:]) <= files[2] + 1  # a checkpoint may be on its way
    assert max(threads[2:]) <= threads[2] + 1
    assert memory[-1] - memory[2] < 20


def least():
    """(file descriptors, threads), the least of a second: a thread takes a moment to end."""
    seen = []
    for _ in range(20):
        seen.append(held()[:2])
        time.sleep(0.05)
    return tuple(map(min, zip(*seen, strict=True)))


def test_runs_one_after_another_leave_no_file_and_no_thread_open(tmp_path):
    train(tmp_path, epochs=1)
    before = least()
    for epochs in range(2, 8):
        train(tmp_path, epochs=epochs)
    assert least() == before
