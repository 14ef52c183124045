"""The work that all peers do, and how they report it.

MLP 784-64-64-10 on MNIST's first 50,000 pictures: batches of 64 in a new order each epoch, the last
one of 16 (782 steps), SGD at 1e-3, float32, mean cross-entropy of the softmax, Glorot's uniform
initial weights, zero biases. A peer trains an epoch to warm up, reports its loss on the 10,000
pictures that are held out, and then takes the time of some more epochs; at the end of each it reads
its losses, as a program must that prints one line an epoch. Pictures are scaled to 0..1 beforehand.
"""

import itertools
import json
import signal
import sys
import time

import numpy as np

EXAMPLES = 50_000
BATCH = 64
STEPS = -(-EXAMPLES // BATCH)
LEARNING_RATE = 1e-3
LAYERS = (784, 64, 64, 10)

Arrays = tuple[np.ndarray, np.ndarray]  # ([n, 784] float32 in 0..1, [n] int32 in 0..9)


def start() -> tuple[Arrays, Arrays]:
    """(train, held out), read from the .npz that the command line names first.

    It also bounds the life of the process, whatever becomes of the one that started it.
    """
    signal.alarm(300)
    with np.load(sys.argv[1]) as archive:
        x = archive["x"].reshape(-1, LAYERS[0]).astype(np.float32) / 255.0
        y = archive["y"].astype(np.int32)
    return (x[:EXAMPLES], y[:EXAMPLES]), (x[EXAMPLES:], y[EXAMPLES:])


def glorot(rng: np.random.Generator) -> list[tuple[np.ndarray, np.ndarray]]:
    """(weights [inputs, outputs], biases [outputs]) of each layer, float32."""
    layers = []
    for inputs, outputs in itertools.pairwise(LAYERS):
        limit = (6 / (inputs + outputs)) ** 0.5
        weights = rng.uniform(-limit, limit, (inputs, outputs))
        layers.append((weights.astype(np.float32), np.zeros(outputs, np.float32)))
    return layers


def keras_model():
    """The same as a Keras model that yields logits; made in the scope of a strategy, if any."""
    import keras

    hidden = [keras.layers.Dense(units, activation="relu") for units in LAYERS[1:-1]]
    return keras.Sequential([keras.Input((LAYERS[0],)), *hidden, keras.layers.Dense(LAYERS[-1])])


def keras_loss(model, held: Arrays) -> float:
    """The mean loss of a Keras model on the pictures that are held out."""
    import keras

    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=None)
    return float(np.mean(loss(held[1], model(held[0], training=False))))


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self._begin


def report(*, steps: int, seconds: float, loss: float) -> None:
    """Hands a figure to the driver: so many steps took so long; the loss is that after an epoch."""
    figure = {"steps_per_second": steps / seconds, "loss": loss}
    print("FIGURE " + json.dumps(figure), flush=True)
