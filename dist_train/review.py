"""Review: what a trained classifier confuses with what, and which examples it gets most wrong.

The chief makes it alone, by plain calls of the model: nothing here is a collective, so the other
workers need not take part.
"""

import dataclasses
import heapq
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from dist_train.examples import Source
from dist_train.program import Program

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
      source: of the examples; of more than 50,000 as many are taken, evenly spaced.
      program: whose model, loss and preprocessing are used, as in an evaluation.
      batch_size: of one call of the model.
      seconds: after which the rest is not looked at.
      beat: called now and then.
    """
    until = time.monotonic() + seconds
    rows = np.unique(np.linspace(0, len(source) - 1, _MOST_EXAMPLES).astype(np.int64))
    batch_size = min(max(batch_size, _LEAST_BATCH), len(rows))
    if not has_labels(source[rows[:1]][1]):
        return None
    judge = _judge(program)
    confusion, seen = np.zeros((0, 0), np.int64), 0
    worst: list[Mistake] = []
    while seen < len(rows) and (not seen or time.monotonic() < until):
        ids = rows[seen : seen + batch_size]
        # The last batch is filled up, so that the model is traced once.
        x, y = source[np.resize(ids, batch_size)]
        labels = np.reshape(y, -1)[: len(ids)].astype(np.int64)
        outputs, losses = judge(x, y)
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
            (heapq.heappush if len(worst) < _MISTAKES else heapq.heappushpop)(worst, found)
        seen += len(ids)
        beat()
    mistakes = tuple(sorted(worst, reverse=True))
    return Review(seen, len(source), confusion, mistakes, _pictures(source, mistakes))


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
        if program.preprocess is not None:
            x, y = program.preprocess(x, y, None)
        outputs = program.model(x, training=False)
        if not number_of_classes(outputs):
            return outputs, tf.zeros([0])
        outputs = tf.cast(outputs, tf.float32)
        return outputs, tf.cast(program.loss(y, outputs), tf.float32)

    def run(x: Any, y: Any) -> tuple[Any, np.ndarray]:
        outputs, losses = judge(*tf.nest.map_structure(tf.convert_to_tensor, (x, y)))
        return outputs, losses.numpy()

    return run


def _pictures(source: Source, mistakes: tuple[Mistake, ...]) -> tuple[np.ndarray, ...]:
    if not mistakes:
        return ()
    x, _ = source[np.array([mistake.index for mistake in mistakes])]
    return tuple(x) if are_pictures(x) else ()


def are_pictures(x: Any) -> bool:
    """Whether inputs [n, …] can be shown: [n, h, w], or [n, h, w, c] of 1, 3 or 4 channels."""
    if not isinstance(x, np.ndarray) or x.dtype.kind not in "uif" or x.ndim not in (3, 4):
        return False
    return min(x.shape[1:3]) >= _LEAST_SIDE and (x.ndim == 3 or x.shape[3] in _CHANNELS)
