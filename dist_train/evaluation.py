"""Evaluation: the exact sums over examples, of which each replica takes its share."""

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from dist_train.program import Program
from dist_train.purity import is_pure

# Operations whose outputs take no memory of their own.
_ALIASES = ("Placeholder", "ReadVariableOp", "Identity", "Reshape", "ExpandDims", "Squeeze")
# Bytes of the largest tensor of a step of which two may be under way; they hold all of it twice.
_SMALL = 8 << 20


def make_evaluation(
    strategy: tf.distribute.Strategy, program: Program, *, overlap: bool
) -> Callable[..., np.ndarray]:
    """fn(data, chunk, steps) -> [sums] float64 over the first `steps` steps of a chunk.

    Not compiled by XLA: an evaluation runs for less time than its compilation would take. One
    collective per call.

    Args:
      overlap: whether a step may begin before the one before has ended, if no step changes
        anything and what it computes is small: then each operation is over before a second core
        has begun.
    """

    def replica_sums(data: Any, chunk: Any, steps: tf.Tensor) -> tf.Tensor:
        def sums_of(step: tf.Tensor) -> tf.Tensor:
            examples, ids = chunk.batch(step, data)
            return program.sums(examples, ids, None)[1]

        at_once = 1
        if overlap and not tf.config.functions_run_eagerly():
            traced = tf.function(sums_of, autograph=False).get_concrete_function(
                tf.TensorSpec([], tf.int32)
            )
            sums_of, at_once = traced, 2 if _may_overlap(traced.graph) else 1
        total = tf.while_loop(
            lambda step, _: step < steps,
            lambda step, total: (step + 1, total + sums_of(step)),
            (tf.constant(0), tf.zeros([len(program.sum_names)])),
            parallel_iterations=at_once,
        )[1]
        context = tf.distribute.get_replica_context()
        return context.all_reduce(tf.distribute.ReduceOp.SUM, tf.identity(total))

    @tf.function(autograph=False)
    def run(data: Any, chunk: Any, steps: tf.Tensor) -> tf.Tensor:
        sums = strategy.run(replica_sums, args=(data, chunk, steps))
        return strategy.experimental_local_results(sums)[0]

    return lambda data, chunk, steps: (
        run(data, chunk, tf.constant(steps)).numpy().astype(np.float64)
    )


def _may_overlap(graph: tf.Graph) -> bool:
    """Whether no operation changes what another step sees, or holds much memory."""
    return is_pure(graph) and all(
        operation.type in _ALIASES or all(map(_is_small, operation.outputs))
        for operation in graph.get_operations()
    )


def _is_small(tensor: tf.Tensor) -> bool:
    elements = tensor.shape.num_elements()
    return elements is not None and elements * max(1, tensor.dtype.size or 0) <= _SMALL
