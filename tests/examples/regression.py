"""A regression with a dict of inputs: the price of a house.

dist-train --task=tests/examples/regression.py:task --optimizer=adam --learning_rate=0.01 --epochs=9
"""

import keras
import numpy as np

import dist_train

DISTRICTS = 12


def houses(count, seed):
    """({"area": [n] m², "rooms": [n], "district": [n] 0 to 11}, price [n] in millions)."""
    rng = np.random.default_rng(seed)
    area = rng.uniform(30, 200, count).astype(np.float32)
    rooms = np.round(area / 25 + rng.normal(size=count)).clip(1, 9).astype(np.float32)
    district = rng.integers(0, DISTRICTS, count)
    level = 1 + 0.1 * district  # of prices; what the embedding has to find out
    price = level * (area + 4 * rooms) / 100 + rng.normal(scale=0.05, size=count)
    return {"area": area, "rooms": rooms, "district": district}, price.astype(np.float32)


def model():
    area, rooms = (keras.Input((), name=name) for name in ("area", "rooms"))
    district = keras.Input((), name="district", dtype="int64")
    numbers = keras.ops.stack([area / 100, rooms / 5], axis=-1)
    hidden = keras.layers.Concatenate()([numbers, keras.layers.Embedding(DISTRICTS, 4)(district)])
    hidden = keras.layers.Dense(32, activation="relu")(hidden)
    price = keras.layers.Reshape(())(keras.layers.Dense(1)(hidden))
    return keras.Model({"area": area, "rooms": rooms, "district": district}, price)


def squared(y, outputs):
    """[batch] squared errors."""
    return keras.ops.square(outputs - y)


def absolute(y, outputs):
    """[batch] absolute errors."""
    return keras.ops.abs(outputs - y)


def task():
    return dist_train.Task(
        model=model,
        train=dist_train.Arrays(*houses(2000, seed=0)),
        validation=dist_train.Arrays(*houses(500, seed=1)),
        test=dist_train.Arrays(*houses(500, seed=2)),
        loss=squared,
        metrics={"error": absolute},
    )
