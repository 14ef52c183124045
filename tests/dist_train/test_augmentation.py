"""Augmentation: keyed by its seed alone, within its bounds, and in training only."""

import itertools

import numpy as np
import pytest
import tensorflow as tf

import dist_train
from dist_train.mnist import task
from dist_train.mnist.augmentation import moved, uniform

RNG = np.random.default_rng(0)
PICTURES = RNG.uniform(size=(200, 28, 28)).astype(np.float32)
SEEDS = np.stack([np.full(200, 123456789), np.arange(200)], axis=1).astype(np.int32)
ALL = {"shift": 2, "zoom": 0.1, "flip": True}


def test_nothing_asked_for_changes_nothing():
    np.testing.assert_array_equal(moved(PICTURES, SEEDS), PICTURES)


def test_a_change_depends_on_the_seed_and_not_on_the_place_in_the_batch():
    whole = moved(PICTURES, SEEDS, **ALL).numpy()
    order = RNG.permutation(200)[:31]
    part = moved(PICTURES[order], SEEDS[order], **ALL)
    np.testing.assert_allclose(part, whole[order], atol=1e-6)
    other = moved(PICTURES, SEEDS + np.array([1, 0], np.int32), **ALL).numpy()
    assert np.all(np.abs(other - whole).max(axis=(1, 2)) > 0.01)


def test_xla_makes_the_same_pictures():
    compiled = tf.function(lambda x, seed: moved(x, seed, **ALL), jit_compile=True)
    np.testing.assert_allclose(
        compiled(PICTURES, SEEDS), moved(PICTURES, SEEDS, **ALL), rtol=1e-5, atol=1e-5
    )


def center(pictures):
    """[batch, 2]: the center of mass, in pixels."""
    weights = pictures / pictures.sum(axis=(1, 2), keepdims=True)
    pixels = np.arange(28)
    return np.stack([weights.sum(axis=2) @ pixels, weights.sum(axis=1) @ pixels], axis=1)


def square(size):
    pictures = np.zeros((200, 28, 28), np.float32)
    first = 14 - size // 2
    pictures[:, first : first + size, first : first + size] = 1.0
    return pictures


def test_a_shift_moves_by_up_to_so_many_whole_pixels_on_each_axis():
    before = square(6)
    after = moved(before, SEEDS, shift=2).numpy()
    assert set(np.unique(after)) == {0.0, 1.0}
    steps = np.round(center(after) - center(before), 3)
    places, counts = np.unique(steps, axis=0, return_counts=True)
    assert sorted(map(tuple, places)) == list(itertools.product(range(-2, 3), repeat=2))
    assert np.sum((counts - 8) ** 2 / 8) < 55  # chi-squared, 24 degrees of freedom


def test_a_zoom_keeps_the_center_and_changes_each_side_by_up_to_its_share():
    before = square(14)
    after = moved(before, SEEDS, zoom=0.2).numpy()
    np.testing.assert_allclose(center(after), center(before), atol=0.02)
    sides = after[:, :, 13].sum(axis=1) / 14
    assert sides.min() == pytest.approx(1 / 1.2, abs=0.04)
    assert sides.max() == pytest.approx(1 / 0.8, abs=0.06)


def test_a_flip_mirrors_half_of_the_pictures():
    after = moved(PICTURES, SEEDS, flip=True).numpy()
    kept = np.abs(after - PICTURES).max(axis=(1, 2)) < 1e-5
    mirrored = np.abs(after - PICTURES[:, :, ::-1]).max(axis=(1, 2)) < 1e-5
    assert np.all(kept ^ mirrored)
    assert 70 < kept.sum() < 130


def test_draws_are_uniform_and_independent():
    seeds = np.stack([np.full(20_000, -7), np.arange(20_000)], axis=1).astype(np.int32)
    draws = uniform(tf.constant(seeds), 4).numpy()
    neighbours = uniform(tf.constant(seeds + np.array([1, 0], np.int32)), 4).numpy()
    assert draws.min() >= -1.0
    assert draws.max() < 1.0
    for column in draws.T:
        counts = np.histogram(column, bins=20, range=(-1, 1))[0]
        assert np.sum((counts - 1000) ** 2 / 1000) < 50  # chi-squared, 19 degrees of freedom
    table = np.corrcoef(np.concatenate([draws[1:], draws[:-1], neighbours[1:]], axis=1).T)
    assert np.abs(table - np.eye(len(table))).max() < 0.04


def test_the_task_changes_pictures_in_training_only():
    config = dist_train.Config(augment_shift=2, augment_zoom=0.1, augment_flip=True)
    x = (255 * PICTURES).astype(np.uint8)
    preprocess, plain = task(config).preprocess, task(dist_train.Config()).preprocess
    np.testing.assert_array_equal(preprocess(x, SEEDS[:, 1], None)[0], x / np.float32(255))
    np.testing.assert_array_equal(plain(x, SEEDS[:, 1], SEEDS)[0], x / np.float32(255))
    np.testing.assert_array_equal(
        preprocess(x, SEEDS[:, 1], SEEDS)[0], moved(x / np.float32(255), SEEDS, **ALL)
    )
