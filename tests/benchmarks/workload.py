"""The work that all peers do, and how they report it.

By default: MLP 784-64-64-10 on MNIST's first 50,000 pictures, batches of 64 in a new order each
epoch, the last one of 16 (782 steps), SGD at 1e-3. Other models, batches and optimizers are a
choice of the driver's. Always: float32, mean cross-entropy of the softmax, Glorot's uniform initial
weights, zero biases. A peer trains an epoch to warm up, reports its loss on the pictures that are
held out, and then takes the time of some more epochs; at the end of each it reads its losses, as a
program must that prints one line an epoch. Pictures are scaled to 0..1 beforehand.
"""

import argparse
import dataclasses
import itertools
import json
import signal
import time
from collections.abc import Sequence

import numpy as np

PIXELS, CLASSES = 784, 10
_HIDDEN = (64, 64)  # units of the MLP
_CHANNELS = (16, 32, 64)  # of the CNN, each convolution followed by a pooling of 2 x 2
_POOLED = 3 * 3  # what is left of 28 x 28 behind three poolings

Arrays = tuple[np.ndarray, np.ndarray]  # ([n, 784] float32 in 0..1, [n] int32 in 0..9)


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is trained.

    Attributes:
      model: mlp (784-64-64-10) or cnn (3 x 3 convolutions of 16, 32, 64 channels).
      batch: examples a step.
      optimizer: sgd or adam.
    """

    model: str = "mlp"
    batch: int = 64
    optimizer: str = "sgd"

    @property
    def name(self) -> str:
        return f"{self.model}, batch {self.batch:,}, {self.optimizer}"

    @property
    def examples(self) -> int:
        """To train on; fewer for the CNN, of which an epoch would take half a minute."""
        return 50_000 if self.model == "mlp" else 12_000

    @property
    def held(self) -> int:
        """Behind these, held out."""
        return 10_000 if self.model == "mlp" else 2_000

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return -(-self.examples // self.batch)

    @property
    def learning_rate(self) -> float:
        """The guide's; for larger batches and models, one with which an epoch teaches something."""
        guide = self.optimizer == "adam" or (self.model, self.batch) == ("mlp", 64)
        return 1e-3 if guide else 0.1

    def epochs(self, usual: int) -> int:
        """How many to take the time of, where it is `usual` for the MLP at batch 64."""
        if self.model == "cnn":
            return 1
        return usual if self.batch <= 64 else 2 * usual

    @property
    def layers(self) -> list[tuple[int, ...]]:
        """The shapes of the layers' weights: [inputs, outputs], or [3, 3, inputs, outputs]."""
        if self.model == "mlp":
            return list(itertools.pairwise((PIXELS, *_HIDDEN, CLASSES)))
        kernels = [(3, 3, *pair) for pair in itertools.pairwise((1, *_CHANNELS))]
        return [*kernels, (_POOLED * _CHANNELS[-1], CLASSES)]

    def glorot(self, rng: np.random.Generator) -> list[tuple[np.ndarray, np.ndarray]]:
        """(weights, biases [outputs]) of each layer, float32."""
        layers = []
        for shape in self.layers:
            field = int(np.prod(shape[:-2]))
            limit = (6 / (field * (shape[-2] + shape[-1]))) ** 0.5
            weights = rng.uniform(-limit, limit, shape)
            layers.append((weights.astype(np.float32), np.zeros(shape[-1], np.float32)))
        return layers

    def keras_model(self):
        """The same as a Keras model that yields logits; made in the scope of a strategy, if any."""
        import keras

        layers = [keras.Input((PIXELS,))]
        if self.model == "mlp":
            layers += [keras.layers.Dense(units, activation="relu") for units in _HIDDEN]
        else:
            layers.append(keras.layers.Reshape((28, 28, 1)))
            for channels in _CHANNELS:
                layers += [
                    keras.layers.Conv2D(channels, 3, activation="relu", padding="same"),
                    keras.layers.MaxPooling2D(),
                ]
            layers.append(keras.layers.Flatten())
        return keras.Sequential([*layers, keras.layers.Dense(CLASSES)])

    def keras_optimizer(self):
        import keras

        kind = {"sgd": keras.optimizers.SGD, "adam": keras.optimizers.Adam}[self.optimizer]
        return kind(self.learning_rate)


@dataclasses.dataclass(frozen=True)
class Start:
    """What a peer starts with.

    Attributes:
      work: what to train.
      train, held: the pictures, [n, 784] float32 in 0..1 and [n] int32.
      epochs: to take the time of.
      how: further words of the command line.
    """

    work: Workload
    train: Arrays
    held: Arrays
    epochs: int
    how: list[str]


def arguments(work: Workload, data: str, epochs: int, how: Sequence[str]) -> list[str]:
    """The command line of a peer, which `start` reads."""
    options = [f"--{name}={value}" for name, value in dataclasses.asdict(work).items()]
    return [data, *how, *options, f"--epochs={epochs}"]


def start() -> Start:
    """Reads the command line and the .npz that it names first.

    It also bounds the life of the process, whatever becomes of the one that started it.
    """
    signal.alarm(300)
    parser = argparse.ArgumentParser()
    parser.add_argument("data")
    parser.add_argument("how", nargs="*")
    for field in dataclasses.fields(Workload):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    parser.add_argument("--epochs", type=int, default=1)
    given = vars(parser.parse_args())
    data, how, epochs = given.pop("data"), given.pop("how"), given.pop("epochs")
    work = Workload(**given)
    with np.load(data) as archive:
        x = archive["x_train"].reshape(-1, PIXELS).astype(np.float32) / 255.0
        y = archive["y_train"].astype(np.int32)
    split = work.examples
    return Start(work, (x[:split], y[:split]), (x[split:], y[split:]), epochs, how)


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


def report(*, steps: int, seconds: float, loss: float | None) -> None:
    """Hands a figure to the driver: so many steps took so long; the loss is that after an epoch."""
    figure = {"steps_per_second": steps / seconds, "loss": loss}
    print("FIGURE " + json.dumps(figure), flush=True)
