"""The order of the examples, and the share of it that each replica gets."""

import math

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_train.schedule import Schedule


def order(schedule, epoch, replicas=1):
    """[replicas, steps, b] ids of a whole epoch in one chunk."""
    return np.stack(
        [
            schedule.share(tf.constant(epoch, tf.int64), tf.constant(r, tf.int64), replicas)[
                0
            ].numpy()
            for r in range(replicas)
        ]
    )


def schedule(examples, batch_size, **options):
    values = {
        "seed": 0,
        "shuffle": True,
        "chunk_steps": math.ceil(examples / batch_size),
        **options,
    }
    return Schedule(examples=examples, batch_size=batch_size, **values)


@pytest.mark.parametrize("examples", [1, 2, 10, 1000, 4097, 65_537])
@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_an_epoch_has_each_example_once(examples, epoch):
    ids = order(schedule(examples, 64), epoch)
    assert sorted(ids[ids >= 0].tolist()) == list(range(examples))


GOLDEN = ([19243, 33170, 37564, 7321, 12566, 26109], [32424, 46535, 22669, 29159, 23289, 30382])


def test_the_order_does_not_change_from_version_to_version():
    ids = order(schedule(50_000, 64), 0)[0, 0, :6].tolist()
    assert ids == GOLDEN[0]
    assert order(schedule(50_000, 64, seed=3), 2)[0, 0, :6].tolist() == GOLDEN[1]


def test_the_orders_of_two_epochs_are_unrelated():
    orders = np.stack([order(schedule(50_000, 50), epoch)[0].reshape(-1) for epoch in range(8)])
    correlation = np.abs(np.corrcoef(orders)[np.triu_indices(8, 1)])
    assert correlation.max() < 0.02  # 1 / sqrt(50,000) = 0.0045 is what chance gives


def test_positions_are_equally_likely():
    # 10 places x 10 examples over 1,000 epochs: chi-square with 81 degrees of freedom; 1e-6 is 150.
    plan, replica = schedule(10, 10), tf.constant(0, tf.int64)
    share = tf.function(lambda epoch: plan.share(epoch, replica, 1)[0])
    orders = np.stack([share(tf.constant(epoch, tf.int64))[0] for epoch in range(1000)])
    counts = np.stack([np.bincount(orders[:, place], minlength=10) for place in range(10)])
    assert ((counts - 100) ** 2 / 100).sum() < 150


@pytest.mark.parametrize("replicas", [2, 3, 4])
@pytest.mark.parametrize(("examples", "batch_size"), [(1000, 64), (1000, 50), (7, 3), (64, 64)])
def test_the_shares_of_replicas_make_up_the_global_batches(replicas, examples, batch_size):
    one = order(schedule(examples, batch_size), 1)[0]
    shares = order(schedule(examples, batch_size), 1, replicas)
    for step, row in enumerate(one):
        together = shares[:, step].reshape(-1)
        assert together[together >= 0].tolist() == row[row >= 0].tolist()


def test_the_order_of_the_file_without_shuffling():
    ids = order(schedule(10, 4, shuffle=False), 3)[0]
    assert ids.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, -9, -9]]


def test_every_step_is_found_in_its_chunk():
    plan = schedule(1000, 64, chunk_steps=5)  # 16 steps an epoch: chunks of 5, 5, 5 and 1
    assert plan.chunks_per_epoch == 4
    assert plan.locate(0) == (0, 0, 5)
    assert plan.locate(7) == (1, 2, 3)
    assert plan.locate(15) == (3, 0, 1)
    assert plan.locate(16) == (4, 0, 5)
    assert [plan.examples_until(step) for step in (0, 1, 15, 16, 17)] == [0, 64, 960, 1000, 1064]


def test_neighbouring_seeds_give_unrelated_orders():
    orders = np.stack(
        [order(schedule(50_000, 50, seed=seed), 0)[0].reshape(-1) for seed in range(8)]
    )
    correlation = np.abs(np.corrcoef(orders)[np.triu_indices(8, 1)])
    assert correlation.max() < 0.02


def test_a_seed_is_not_an_epoch():
    assert (order(schedule(100, 10, seed=1), 0) != order(schedule(100, 10, seed=0), 1)).any()


@pytest.mark.parametrize("replicas", [1, 3])
def test_the_order_does_not_depend_on_the_chunks(replicas):
    whole = order(schedule(1000, 64), 2, replicas)
    plan = schedule(1000, 64, chunk_steps=5)
    parts = [
        order(plan, 2 * plan.chunks_per_epoch + number, replicas)
        for number in range(plan.chunks_per_epoch)
    ]
    together = np.concatenate(parts, axis=1)
    np.testing.assert_array_equal(together[:, : whole.shape[1]], whole)
    assert (together[:, whole.shape[1] :] < 0).all()  # steps beyond the epoch hold no example


@settings(max_examples=200)
@given(
    examples=st.integers(1, 300),
    batch_size=st.integers(1, 70),
    chunk_steps=st.integers(1, 20),
    step=st.integers(0, 1000),
)
def test_any_step_is_where_counting_finds_it(examples, batch_size, chunk_steps, step):
    plan = schedule(examples, batch_size, chunk_steps=chunk_steps)
    sizes = [min(batch_size, examples - at) for at in range(0, examples, batch_size)]
    chunks = [len(sizes[at : at + chunk_steps]) for at in range(0, len(sizes), chunk_steps)]
    places = [
        (number, within, length - within)
        for number, length in enumerate(chunks)
        for within in range(length)
    ]
    epoch, within = divmod(step, len(sizes))
    chunk, start, left = places[within]
    assert plan.locate(step) == (epoch * len(chunks) + chunk, start, left)
    assert plan.examples_until(step) == epoch * examples + sum(sizes[:within])


@settings(max_examples=30)
@given(
    examples=st.integers(1, 60),
    batch_size=st.integers(1, 20),
    replicas=st.integers(1, 5),
    shuffle=st.booleans(),
)
def test_shares_hold_each_example_once_in_the_place_of_one_replica(
    examples, batch_size, replicas, shuffle
):
    plan = schedule(examples, batch_size, shuffle=shuffle)
    shares = order(plan, 3, replicas)
    columns = np.concatenate(list(shares), axis=1)
    np.testing.assert_array_equal(columns[:, :batch_size], order(plan, 3)[0])
    # What takes the place of a missing one is an example of the same batch.
    stand_in = np.where(columns[:, :1] >= 0, -1 - columns[:, :1], columns[:, :1])
    assert (columns[:, batch_size:] == stand_in).all()
    missing = columns[:, :batch_size] < 0
    assert (
        columns[:, :batch_size][missing] == np.broadcast_to(stand_in, missing.shape)[missing]
    ).all()
