"""Review: what a trained classifier confuses with what, and which examples it gets most wrong.

The chief makes it alone, by plain calls of the model: nothing here is a collective, so the other
workers need not take part.
"""

import dataclasses
import heapq
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from dist_train.examples import Dataset, Source, spaced
from dist_train.program import Program
from dist_train.reading import fetch

_MOST_EXAMPLES = 50_000
_MOST_CLASSES = 200
_MISTAKES = 25
_LEAST_BATCH = 32
_LEAST_SIDE, _CHANNELS = 8, (1, 3, 4)


@dataclasses.dataclass(frozen=True, order=True)
class Mistake:
    """An example whose most probable class is not its label; ordered by its loss.

    Attributes:
      loss: the task's own, of this example.
      index: in its source.
      label, guess: classes.
      probability: of the guess.
    """

    loss: float
    index: int
    label: int
    guess: int
    probability: float


@dataclasses.dataclass(frozen=True)
class Review:
    """What was seen.

    Attributes:
      examples, of: how many were looked at, each once, and how many there are.
      confusion: [classes, classes] int64, how often a label (row) was taken for a class (column).
      mistakes: the worst, by falling loss.
      pictures: the inputs of `mistakes`, [h, w] or [h, w, c]; none if they are no images.
    """

    examples: int
    of: int
    confusion: np.ndarray
    mistakes: tuple[Mistake, ...]
    pictures: tuple[np.ndarray, ...]


def examine(
    source: Source,
    program: Program,
    *,
    batch_size: int,
    seconds: float,
    beat: Callable[[], None] = lambda: None,
) -> Review | None:
    """The review of a classifier: integer labels [n] or [n, 1], outputs [n, classes].

    None if the task is something else.

    Args:
      source: of the examples; of more than 50,000 as many are taken, evenly spaced, or the first
        ones of a Dataset.
      program: whose model, loss and preprocessing are used, as in an evaluation.
      batch_size: of one call of the model.
      seconds: after which the rest is not looked at.
      beat: called now and then.
    """
    until = time.monotonic() + seconds
    batch_size = min(max(batch_size, _LEAST_BATCH), len(source))
    if not has_labels(fetch(source, np.zeros(1, np.int64))[1]):
        return None
    judge = _judge(program)
    confusion, seen = np.zeros((0, 0), np.int64), 0
    worst = _Worst()
    for ids, x, y in _batches(source, batch_size):
        if seen and time.monotonic() >= until:
            break
        labels = np.reshape(y, -1).astype(np.int64)
        # The last batch is filled up, so that the model is traced once.
        filled = np.resize(np.arange(len(ids)), batch_size)
        outputs, losses = judge(*tf.nest.map_structure(lambda array, at=filled: array[at], (x, y)))
        classes = len(confusion) or number_of_classes(outputs)
        if not classes or labels.min() < 0 or labels.max() >= classes:
            return None
        confusion = confusion if seen else np.zeros((classes, classes), np.int64)
        chances = probabilities(outputs.numpy()[: len(ids)])
        guesses = chances.argmax(axis=1)
        np.add.at(confusion, (labels, guesses), 1)
        for row in np.flatnonzero(guesses != labels):
            guess = int(guesses[row])
            found = Mistake(
                float(losses[row]), int(ids[row]), int(labels[row]), guess,
                float(chances[row, guess]),
            )  # fmt: skip
            worst.add(found, x, int(row))
        seen += len(ids)
        beat()
    return Review(seen, len(source), confusion, worst.mistakes, worst.pictures)


class _Worst:
    """The worst mistakes so far and, of images, what they look like."""

    def __init__(self) -> None:
        self._heap: list[Mistake] = []
        self._pictures: dict[int, np.ndarray] = {}

    def add(self, mistake: Mistake, x: Any, row: int) -> None:
        """One of the inputs `x`, [n, …], in the place `row`."""
        if len(self._heap) < _MISTAKES:
            heapq.heappush(self._heap, mistake)
        else:
            dropped = heapq.heappushpop(self._heap, mistake)
            if dropped is mistake:
                return
            self._pictures.pop(dropped.index, None)
        if are_pictures(x):
            self._pictures[mistake.index] = x[row].copy()

    @property
    def mistakes(self) -> tuple[Mistake, ...]:
        return tuple(sorted(self._heap, reverse=True))

    @property
    def pictures(self) -> tuple[np.ndarray, ...]:
        return tuple(self._pictures[mistake.index] for mistake in self.mistakes if self._pictures)


def _batches(source: Source, size: int) -> Iterator[tuple[np.ndarray, Any, Any]]:
    """(indices [n], x, y) of those that are looked at, n <= size."""
    if isinstance(source, Dataset):  # which is read in its order
        seen = 0
        for x, y in source.blocks(0, size):
            count = len(tf.nest.flatten(y)[0])
            yield np.arange(seen, seen + count), x, y
            if (seen := seen + count) >= _MOST_EXAMPLES:
                return
        return
    rows = spaced(source, _MOST_EXAMPLES)
    for begin in range(0, len(rows), size):
        ids = rows[begin : begin + size]
        yield ids, *fetch(source, ids)


def has_labels(y: Any) -> bool:
    """Whether targets are classes: one array of integers, [n] or [n, 1]."""
    if not isinstance(y, np.ndarray) or y.dtype.kind not in "iu":
        return False
    return y.ndim == 1 or (y.ndim == 2 and y.shape[1] == 1)


def number_of_classes(outputs: Any, most: int | None = _MOST_CLASSES) -> int:
    """Of outputs [n, classes]; 0: they are something else, or more than `most`."""
    if not tf.is_tensor(outputs) or outputs.shape.rank != 2 or not outputs.dtype.is_floating:
        return 0
    classes = outputs.shape[1] or 0
    return classes if 2 <= classes <= (most or classes) else 0


def probabilities(outputs: np.ndarray) -> np.ndarray:
    """[n, classes]: the outputs if they are probabilities already, else their softmax."""
    if outputs.min() >= 0.0 and np.allclose(outputs.sum(axis=1), 1.0, atol=1e-3):
        return outputs
    powers = np.exp(outputs - outputs.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def _judge(program: Program) -> Callable[[Any, Any], tuple[Any, np.ndarray]]:
    @tf.function(autograph=False)
    def judge(x: Any, y: Any) -> tuple:
        x, y = program.prepared((x, y))
        outputs = program.model(x, training=False)
        if not number_of_classes(outputs):
            return outputs, tf.zeros([0])
        outputs = tf.cast(outputs, tf.float32)
        return outputs, tf.cast(program.loss(y, outputs), tf.float32)

    def run(x: Any, y: Any) -> tuple[Any, np.ndarray]:
        outputs, losses = judge(*tf.nest.map_structure(tf.convert_to_tensor, (x, y)))
        return outputs, losses.numpy()

    return run


def are_pictures(x: Any) -> bool:
    """Whether inputs [n, …] can be shown: [n, h, w], or [n, h, w, c] of 1, 3 or 4 channels."""
    if not isinstance(x, np.ndarray) or x.dtype.kind not in "uif" or x.ndim not in (3, 4):
        return False
    return min(x.shape[1:3]) >= _LEAST_SIDE and (x.ndim == 3 or x.shape[3] in _CHANNELS)
