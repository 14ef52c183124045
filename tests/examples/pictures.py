"""Pictures in a file that is larger than the memory they may take: numpy.memmap, streamed.

dist-train --task=tests/examples/pictures.py:task --data_dir=pictures --learning_rate=1 --epochs=1
"""

from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import dist_train

COUNT, SHAPE, CLASSES = 16_384, (128, 128, 3), 4  # 768 MiB


def draw(folder):
    """Writes COUNT noisy pictures, bright in the quarter that is their class; once."""
    if (folder / "labels.npy").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, COUNT)
    noise = rng.integers(0, 200, (64, *SHAPE), dtype=np.uint8)
    pictures = np.memmap(folder / "pictures.raw", np.uint8, "w+", shape=(COUNT, *SHAPE))
    for begin in range(0, COUNT, 64):
        block = noise.copy()  # in memory, 3 MiB at a time
        for picture, label in zip(block, labels[begin : begin + 64], strict=True):
            row, column = 64 * (label // 2), 64 * (label % 2)
            picture[row : row + 64, column : column + 64] += 55
        pictures[begin : begin + 64] = block
    pictures.flush()
    np.save(folder / "labels.npy", labels)


def model():
    pool, flat = keras.layers.AveragePooling2D(32), keras.layers.Flatten()
    return keras.Sequential([keras.Input(SHAPE), pool, flat, keras.layers.Dense(CLASSES)])


def scale(x, y, seed):
    """uint8 -> float32 in 0..1, on the device: a quarter of the bytes travel."""
    return tf.cast(x, tf.float32) / 255.0, y


def task(config):
    folder = Path(config.data_dir or "pictures")
    draw(folder)
    pictures = np.memmap(folder / "pictures.raw", np.uint8, "r", shape=(COUNT, *SHAPE))
    labels, split = np.load(folder / "labels.npy"), COUNT - 1024
    return dist_train.Task(
        model=model,
        train=dist_train.Arrays(pictures[:split], labels[:split]),
        test=dist_train.Arrays(pictures[split:], labels[split:]),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics={"accuracy": keras.metrics.sparse_categorical_accuracy},
        preprocess=scale,
    )
