"""Evaluation: the exact sums over examples, of which each replica takes its share."""

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from dist_train.program import Program


def make_evaluation(
    strategy: tf.distribute.Strategy, program: Program
) -> Callable[..., np.ndarray]:
    """fn(data, chunk, steps) -> [sums] float64 over the first `steps` steps of a chunk.

    Not compiled by XLA: an evaluation runs for less time than its compilation would take. One
    collective per call.
    """

    def replica_sums(data: Any, chunk: Any, steps: tf.Tensor) -> tf.Tensor:
        def body(step: tf.Tensor, total: tf.Tensor) -> tuple:
            examples, ids = chunk.batch(step, data)
            return step + 1, total + program.sums(examples, ids, None)[1]

        start = (tf.constant(0), tf.zeros([len(program.sum_names)]))
        total = tf.while_loop(lambda step, _: step < steps, body, start, parallel_iterations=1)[1]
        context = tf.distribute.get_replica_context()
        return context.all_reduce(tf.distribute.ReduceOp.SUM, tf.identity(total))

    @tf.function(autograph=False)
    def run(data: Any, chunk: Any, steps: tf.Tensor) -> tf.Tensor:
        sums = strategy.run(replica_sums, args=(data, chunk, steps))
        return strategy.experimental_local_results(sums)[0]

    return lambda data, chunk, steps: (
        run(data, chunk, tf.constant(steps)).numpy().astype(np.float64)
    )
