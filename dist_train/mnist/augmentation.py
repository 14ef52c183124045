"""Augmentation: a picture moved, resized and mirrored a little, another way each epoch."""

from typing import Any

import tensorflow as tf


def moved(
    x: tf.Tensor, seed: tf.Tensor, *, shift: int = 0, zoom: float = 0.0, flip: bool = False
) -> tf.Tensor:
    """Pictures at another place, in another size, or mirrored; outside of the picture is 0.

    Each axis is resampled by itself, so that all of it is two products of matrices.

    Args:
      x: [batch, height, width] float32.
      seed: [batch, 2] int32; the same one gives the same change.
      shift: whole pixels, at most, up or down and to the left or right.
      zoom: below 1; height and width are each divided by something within 1 - zoom to 1 + zoom.
      flip: mirror half of the pictures, left to right.
    """
    draws = uniform(seed, 5)  # [batch, 5] in -1..1
    mirrored = tf.where(draws[:, 4] < 0.0, -1.0, 1.0) if flip else 1.0
    # Whole: between two pixels a picture would be blurred, as those of an evaluation are not.
    shifts = tf.floor((draws[:, :2] + 1.0) / 2.0 * (2 * shift + 1)) - shift
    scales = 1.0 + zoom * draws[:, 2:4]
    down = _resampling(x.shape[1], shifts[:, 0], scales[:, 0])
    across = _resampling(x.shape[2], shifts[:, 1], scales[:, 1] * mirrored)
    return tf.matmul(tf.matmul(down, x), across, transpose_b=True)


def _resampling(size: int, shift: tf.Tensor, scale: tf.Tensor) -> tf.Tensor:
    """[batch, size, size]: pixel i becomes what lies at center + scale · (i - center) + shift.

    Linear between the two pixels beside that place.
    """
    pixels = tf.range(size, dtype=tf.float32)
    center = (size - 1) / 2
    places = center + scale[:, tf.newaxis] * (pixels - center) + shift[:, tf.newaxis]
    return tf.nn.relu(1.0 - tf.abs(places[:, :, tf.newaxis] - pixels))


def uniform(seed: tf.Tensor, count: int) -> tf.Tensor:
    """[batch, count] float32, uniform in -1..1, from seeds [batch, 2] int32.

    tf.random.stateless_uniform takes a single seed, and a call for each example takes longer than
    a step.
    """
    key, example = tf.unstack(tf.bitcast(seed, tf.uint32), axis=1)
    mixed = _mixed(key + _mixed(example))[:, tf.newaxis]
    bits = _mixed(mixed + tf.cast(tf.range(1, count + 1), tf.uint32))
    # 24 bits are all that a float32 holds.
    return tf.cast(tf.bitwise.right_shift(bits, _u(8)), tf.float32) / 2.0**23 - 1.0


def _mixed(x: tf.Tensor) -> tf.Tensor:
    """A hash of uint32 (C. Wellons' lowbias32: github.com/skeeto/hash-prospector)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = tf.bitwise.bitwise_xor(x, tf.bitwise.right_shift(x, _u(shift))) * _u(factor)
    return tf.bitwise.bitwise_xor(x, tf.bitwise.right_shift(x, _u(16)))


def _u(value: int) -> Any:
    return tf.constant(value, tf.uint32)
