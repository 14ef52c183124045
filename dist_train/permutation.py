"""Permutation: places of a random order, each computed by itself.

As `tf.random.experimental.index_shuffle` does: a Simon cipher (Beaulieu et al., 2013) of words as
short as the numbers allow, applied until a number is in range (cycle walking: Black and Rogaway,
2002). TensorFlow's operation takes up to four times as long, since it schedules the keys anew for
each place; and where the last number is a power of four, from 65,536 on, it gives one number twice
and another never.
"""

import functools
from collections.abc import Callable

import numpy as np

_LEAST_BITS = 8  # of a word; shorter ones show patterns
_LEAST_NUMBERS = 1 << 2 * _LEAST_BITS
_C, _Z = 0xFFFFFFFC, 0x7369F885192C0EF5


def permuted(places: np.ndarray, key: np.ndarray, count: int, rounds: int) -> np.ndarray:
    """[n] int64, the numbers at some places of an order of 0 to count - 1.

    Args:
      places: [n] int64, from 0 to count - 1.
      key: [3] uint32; another one gives another order.
      count: from 1 to 2³².
      rounds: of the cipher, even and at least 4; the more, the less have two orders in common.
    """
    words = tuple(map(int, key))
    if 4 * count < _LEAST_NUMBERS:
        return _few(words, count, rounds)[places]
    bits = max(_LEAST_BITS, ((count - 1).bit_length() + 1) // 2)
    encrypt = _cipher(_keys(words, bits, rounds), bits)
    found = encrypt(places)
    outside = np.flatnonzero(found >= count)
    while len(outside):
        found[outside] = encrypt(found[outside])
        outside = outside[found[outside] >= count]
    return found


@functools.lru_cache(maxsize=2)  # of two epochs, whose chunks may be many
def _few(key: tuple[int, ...], count: int, rounds: int) -> np.ndarray:
    """All of a short order: a walk is long, but all numbers are few, and each step halves it."""
    following = _cipher(_keys(key, _LEAST_BITS, rounds), _LEAST_BITS)(np.arange(_LEAST_NUMBERS))
    while (following[:count] >= count).any():
        following = np.where(following < count, following, following[following])
    return following[:count].copy()


def _cipher(keys: list[int], bits: int) -> Callable[[np.ndarray], np.ndarray]:
    mask = (1 << bits) - 1
    dtype = np.uint16 if 2 * bits <= 16 else np.uint32  # has room for two words

    def mixed(word: np.ndarray) -> np.ndarray:
        both = word << bits | word  # side by side, so that a shift rotates
        return ((both >> (bits - 1)) & (both >> (bits - 8)) ^ (both >> (bits - 2))) & mask

    def encrypt(numbers: np.ndarray) -> np.ndarray:
        left: np.ndarray = (numbers >> bits).astype(dtype)
        right: np.ndarray = (numbers & mask).astype(dtype)
        for even, odd in zip(keys[::2], keys[1::2], strict=True):
            left ^= mixed(right) ^ even
            right ^= mixed(left) ^ odd
        return left.astype(np.int64) << bits | right

    return encrypt


def _keys(key: tuple[int, ...], bits: int, rounds: int) -> list[int]:
    mask = (1 << bits) - 1
    keys, z = [word & mask for word in key], _Z & mask
    for _ in range(3, rounds):
        both = keys[-1] << bits | keys[-1]
        keys.append((_C ^ (z & 1) ^ keys[-3] ^ (both >> 3) ^ (both >> 4)) & mask)
        z >>= 1
    return keys
