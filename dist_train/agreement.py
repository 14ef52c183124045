"""Agreement: the proof, within the step's own reduction, that all replicas hold equal weights.

Each of R replicas gives a hash h of its weights and h². Only equal ones have R Σh² = (Σh)².
"""

import math
from collections.abc import Sequence
from typing import Any

import tensorflow as tf


def weight_hash(variables: Sequence[Any], replicas: int) -> tf.Tensor:
    """[] float32, an integer made of the bits of a replica's weights; see `hash_values`.

    Two replicas that differ are found at the next step with a chance of 255 in 256 (if they are not
    more than 256), and go on to differ.
    """
    total = tf.constant(0, tf.int32)
    for variable in variables:
        bits = tf.bitcast(tf.cast(variable.value, tf.float32), tf.int32)
        total += tf.reduce_sum(bits)
    mixed = tf.bitwise.bitwise_xor(total, tf.bitwise.right_shift(total, 16))
    mixed = tf.bitwise.bitwise_xor(mixed, tf.bitwise.right_shift(mixed, 8))
    return tf.cast(tf.bitwise.bitwise_and(mixed, hash_values(replicas) - 1), tf.float32)


def hash_values(replicas: int) -> int:
    """How many values a hash may have, so that the sum of its squares is exact in float32.

    A power of two, at most 256: replicas · values² <= 2²⁴.
    """
    return min(256, 1 << (24 - math.ceil(math.log2(replicas))) // 2)


def agree(replicas: int, hashes: Any, squares: Any) -> Any:
    """Whether the hashes were equal, from the sums of them and of their squares, float32."""
    return replicas * squares == hashes * hashes
