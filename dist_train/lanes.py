"""Lanes: whether a step computes two halves of its batch side by side, for the second core.

Eigen, which XLA has for matrix products, gives a product of a small model to one core, and between
two products a core waits for the other. Two halves of the batch know nothing of each other until
their gradients are added, so each core has one of its own. That costs a second set of products to
compile and of gradients to add, which larger models and short runs do not earn back: here are the
bounds within which it was measured to pay.
"""

import os
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from dist_train import cores
from dist_train.layers import all_layers
from dist_train.program import Program
from dist_train.purity import is_pure

_BATCH = range(64, 512 + 1, 2)
_WEIGHTS = 1 << 18
_STEPS = 1 << 14
_EPOCHS = 16  # that are tried


def choose(program: Program, *, batch_size: int, steps: int, examples: Any) -> int:
    """1, or 2 where that is faster and the same sums.

    Args:
      program: what a step computes, compiled by XLA for the one CPU device of this process.
      batch_size: of a step.
      steps: of the run.
      examples: (x, y) with arrays [b, …], to try it on.
    """
    pays = (
        _cores() > 1
        and steps >= _STEPS
        and batch_size in _BATCH
        and program.parts == 1
        and _is_small_and_dense(program.model)
    )
    try:
        return 2 if pays and _is_separable(program, examples) else 1
    except Exception:  # the first step fails too, and says where
        logging.debug("the step cannot be tried on a few examples", exc_info=True)
        return 1


def _is_separable(program: Program, examples: Any) -> bool:
    """Whether sums and gradients of some examples are those of two halves of them, added.

    They are not if a layer, or `preprocess`, looks at other examples than its own. It may do so at
    random, by the epoch: some are tried. Nothing runs before it is known to change nothing.
    """

    @tf.function(autograph=False)
    def share(some: Any, ids: tf.Tensor, epoch: tf.Tensor) -> list[tf.Tensor]:
        gradients, sums = program.gradients(some, ids, epoch)
        return [sums, *gradients]

    half = len(tf.nest.flatten(examples)[0]) // 2
    if half == 0 or tf.config.functions_run_eagerly():
        return False
    parts = slice(2 * half), slice(half), slice(half, 2 * half)
    some = [tf.nest.map_structure(lambda array, at=at: array[at], examples) for at in parts]
    ids = [tf.range(2 * half)[at] for at in parts]
    if not is_pure(share.get_concrete_function(some[0], ids[0], tf.constant(0)).graph):
        return False
    for epoch in range(_EPOCHS):
        whole, *halves = (share(*part, tf.constant(epoch)) for part in zip(some, ids, strict=True))
        if not all(map(_is_close, whole, map(tf.add, *halves))):
            return False
    return True


def _is_close(one: tf.Tensor, other: tf.Tensor) -> bool:
    most = np.max(np.abs(one), initial=0.0)
    return np.allclose(one, other, rtol=1e-3, atol=1e-4 * most)


def _cores() -> int:
    """How many can work at a product: TensorFlow has so many threads for it."""
    granted = cores.granted()
    told = os.environ.get("TF_NUM_INTRAOP_THREADS", "")
    threads = tf.config.threading.get_intra_op_parallelism_threads()
    return min(granted, threads or (int(told) if told.isdigit() else 0) or granted)


def _is_small_and_dense(model: keras.Model) -> bool:
    """And of float32: sums of float16 may overflow for the whole, and not for its halves."""
    layers = all_layers(model)
    dense = [layer for layer in layers if isinstance(layer, keras.layers.Dense)]
    weights = sum(int(np.prod(variable.shape)) for variable in model.trainable_variables)
    return (
        weights <= _WEIGHTS
        and len(model.weights) == sum(len(layer.trainable_weights) for layer in dense)
        and all(layer.compute_dtype == "float32" for layer in (model, *layers))
    )
