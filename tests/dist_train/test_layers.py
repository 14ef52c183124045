import re

import keras
import pytest
import tensorflow as tf

from dist_train import UsageError, layers


def _dense():
    return keras.Sequential([keras.Input((8,)), keras.layers.Dense(2)])


def _convolution():
    return keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Conv2D(2, 3)])


def _nested(*inner, shape=(8,)):
    return keras.Sequential([keras.Input(shape), keras.Sequential([keras.Sequential(inner)])])


def _normalized(synchronized=False):
    return _nested(keras.layers.BatchNormalization(synchronized=synchronized, name="norm"))


_CASES = {
    "asked for": ("true", _convolution, {"gpu": False, "replicas": 1, "strings": True}, True),
    "refused": ("false", _dense, {"gpu": True, "replicas": 1, "strings": False}, False),
    "dense": ("auto", _dense, {"gpu": False, "replicas": 4, "strings": False}, True),
    "strings": ("auto", _dense, {"gpu": True, "replicas": 1, "strings": True}, False),
    "convolution on CPU": (
        "auto",
        _convolution,
        {"gpu": False, "replicas": 1, "strings": False},
        False,
    ),
    "convolution on GPU": (
        "auto",
        _convolution,
        {"gpu": True, "replicas": 1, "strings": False},
        True,
    ),
    # XLA draws other random numbers from the same seed, so the choice must not depend on how many
    # replicas there are.
    "several replicas": ("auto", _dense, {"gpu": False, "replicas": 4, "strings": False}, True),
    "one synchronized replica": (
        "auto",
        lambda: _normalized(True),
        {"gpu": False, "replicas": 1, "strings": False},
        True,
    ),
    "two synchronized replicas": (
        "auto",
        lambda: _normalized(True),
        {"gpu": True, "replicas": 2, "strings": False},
        False,
    ),
}


@pytest.mark.parametrize(("mode", "model", "options", "expected"), _CASES.values(), ids=_CASES)
def test_xla_is_chosen_by_device_and_layers(mode, model, options, expected):
    chosen, reason = layers.choose_jit(mode, model(), **options)
    assert chosen is expected
    assert reason


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (keras.layers.Conv1D(1, 1), (8, 2)),
        (keras.layers.Conv3D(1, 1), (4, 4, 4, 1)),
        (keras.layers.Conv2DTranspose(1, 2), (4, 4, 1)),
        (keras.layers.DepthwiseConv2D(2), (4, 4, 1)),
        (keras.layers.SeparableConv1D(1, 2), (8, 2)),
        (keras.layers.TimeDistributed(keras.layers.Conv2D(1, 2)), (3, 4, 4, 1)),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_convolution_is_found_wherever_it_hides(layer, shape):
    model = _nested(layer, shape=shape)
    options = {"replicas": 1, "strings": False}
    assert not layers.choose_jit("auto", model, gpu=False, **options)[0]
    assert layers.choose_jit("auto", model, gpu=True, **options)[0]


def _check(model, batch_size, examples, replicas):
    layers.check_batch_statistics(
        model, batch_size=batch_size, examples=examples, replicas=replicas
    )


def test_without_batch_statistics_any_batch_works():
    _check(_dense(), 64, 50_000, 3)
    _check(_nested(keras.layers.LayerNormalization()), 64, 50_000, 3)


@pytest.mark.parametrize(
    ("batch_size", "examples", "replicas"), [(50, 50_000, 1), (50, 50_000, 2), (7, 7, 7)]
)
def test_batches_without_padding_work(batch_size, examples, replicas):
    _check(_normalized(synchronized=True), batch_size, examples, replicas)


@pytest.mark.parametrize(
    ("batch_size", "examples", "replicas"),
    [(64, 50_000, 1), (64, 50_000, 4), (64, 64, 3), (50, 50_000, 3), (3, 1000, 8), (1, 12, 4)],
)
def test_every_batch_size_that_is_named_works(batch_size, examples, replicas):
    model = _normalized(synchronized=True)
    with pytest.raises(UsageError, match="norm normalizes over the batch") as caught:
        _check(model, batch_size, examples, replicas)
    remedy = str(caught.value).rpartition("; ")[2]
    named = [int(number) for number in re.findall(r"\d+", remedy)]
    possible = [n for n in range(1, examples + 1) if examples % n == 0 and n % replicas == 0]
    assert bool(named) == bool(possible)
    for size in named:
        _check(model, size, examples, replicas)


def test_where_no_batch_size_works_the_error_says_so():
    with pytest.raises(UsageError, match="change the number of examples"):
        _check(_normalized(synchronized=True), 64, 1001, 2)


def test_statistics_of_each_replica_alone_are_refused():
    _check(_normalized(), 50, 50_000, 1)
    with pytest.raises(UsageError, match=r"use BatchNormalization\(synchronized=True\)"):
        _check(_normalized(), 50, 50_000, 2)


def test_random_states_are_those_of_dropout_and_the_like():
    model = _nested(keras.layers.Dropout(0.5), keras.layers.Dense(2), keras.layers.GaussianNoise(1))
    assert len(layers.random_states(model)) == 2
    assert layers.random_states(_dense()) == []


def test_randomness_differs_from_replica_to_replica_but_for_the_first():
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1", "CPU:2"])
    with strategy.scope():
        model = _nested(keras.layers.Dropout(0.5, seed=7))
    (state,) = layers.random_states(model)
    before = state.numpy().tolist()
    layers.separate_randomness(strategy, model)
    states = [s.numpy().tolist() for s in strategy.experimental_local_results(state.value)]
    assert states[0] == before
    assert len({tuple(s) for s in states}) == 3
    assert {s[1] for s in states} == {before[1]}  # the counter advances alike


def test_frozen_batch_statistics_are_no_obstacle():
    model = _normalized()
    model.trainable = False
    _check(model, 64, 50_000, 3)
    layers.check_batch_statistics(model, batch_size=64, examples=100, replicas=3, parts=2)


@pytest.mark.parametrize(
    ("batch_size", "examples", "replicas", "parts", "padded"),
    [
        (64, 128, 2, 1, False),
        (64, 128, 2, 4, False),
        (64, 128, 3, 1, True),
        (64, 100, 1, 1, True),
        (64, 128, 2, 5, True),
    ],
)
def test_padding_is_told_with_batch_sizes_that_need_none(
    batch_size, examples, replicas, parts, padded
):
    sizes = {"examples": examples, "replicas": replicas, "parts": parts}
    told = layers.padding(batch_size=batch_size, **sizes)
    assert (told is not None) == padded
    if told and "use" in told:
        for size in re.findall(r"\d+", told.rpartition("; ")[2]):
            assert layers.padding(batch_size=int(size), **sizes) is None
