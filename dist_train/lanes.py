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

from dist_train.layers import all_layers
from dist_train.program import Program

_BATCH = range(64, 512 + 1, 2)
_WEIGHTS = 1 << 18
_STEPS = 1 << 13


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
    return 2 if pays and _is_separable(program, examples) else 1


def _is_separable(program: Program, examples: Any) -> bool:
    try:
        return program.is_separable(examples)
    except Exception:  # the first step fails too, and says where
        logging.debug("the step cannot be tried on a few examples", exc_info=True)
        return False


def _cores() -> int:
    """How many can work at a product: TensorFlow has so many threads for it."""
    cores = len(os.sched_getaffinity(0))
    told = os.environ.get("TF_NUM_INTRAOP_THREADS", "")
    threads = tf.config.threading.get_intra_op_parallelism_threads()
    return min(cores, threads or (int(told) if told.isdigit() else 0) or cores)


def _is_small_and_dense(model: keras.Model) -> bool:
    """And without a state, which would change twice a step, or sums that may overflow."""
    weights = sum(int(np.prod(variable.shape)) for variable in model.trainable_variables)
    layers = [layer for layer in all_layers(model) if not isinstance(layer, keras.Model)]
    return (
        weights <= _WEIGHTS
        and not model.non_trainable_variables
        and all(isinstance(layer, keras.layers.Dense) or not layer.weights for layer in layers)
        and all(layer.compute_dtype == "float32" for layer in layers)
    )
