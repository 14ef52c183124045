"""Places of a random order, each computed by itself."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from dist_train.permutation import permuted

KEY = np.array([7, 1 << 31, 0xDEADBEEF], np.uint32)
ROUNDS = 16


def by_tensorflow(places, key, count, rounds):
    return tf.raw_ops.RandomIndexShuffle(
        index=places, seed=tf.constant(key), max_index=tf.constant(count - 1, tf.int64),
        rounds=rounds,
    ).numpy()  # fmt: skip


@given(
    count=st.integers(1, 2**31).filter(lambda count: count - 1 not in [4**n for n in range(8, 16)]),
    key=st.lists(st.integers(0, 2**32 - 1), min_size=3, max_size=3),
    rounds=st.integers(2, 16).map(lambda half: 2 * half),
    seed=st.integers(0, 1000),
)
def test_an_order_is_that_of_tensorflow(count, key, rounds, seed):
    places = np.random.default_rng(seed).integers(0, count, 50)
    key = np.array(key, np.uint32)
    found = permuted(places, key, count, rounds)
    np.testing.assert_array_equal(found, by_tensorflow(places, key, count, rounds))


@pytest.mark.parametrize("count", [1, 2, 3, 16_384, 16_385, 50_000, 65_536, 65_537, 262_145])
def test_an_order_has_each_number_once(count):
    found = permuted(np.arange(count), KEY, count, ROUNDS)
    np.testing.assert_array_equal(np.sort(found), np.arange(count))


def test_tensorflow_repeats_a_number_where_the_last_is_a_power_of_four():
    count = 4**8 + 1  # why the order is not made by its operation; if this fails, it may be
    assert len(np.unique(by_tensorflow(np.arange(count), KEY, count, ROUNDS))) < count


def test_a_place_depends_on_no_other():
    places = np.array([40_000, 3, 3, 49_999])
    whole = permuted(np.arange(50_000), KEY, 50_000, ROUNDS)
    np.testing.assert_array_equal(permuted(places, KEY, 50_000, ROUNDS), whole[places])


def test_no_place_at_all():
    assert permuted(np.arange(0), KEY, 10, ROUNDS).shape == (0,)
