import math

import keras
import numpy as np
import pytest
import tensorflow as tf

from dist_train import UsageError, optimizers
from dist_train.optimizers import WarmupSchedule, last_rate, make

_PEAK, _TOTAL = 0.3, 1000


def _by_formula(decay, step, warmup, total):
    if step < warmup:
        return _PEAK * (step + 1) / warmup
    p = min(1.0, (step - warmup) / max(1, total - warmup))
    return (
        _PEAK
        * {
            "constant": 1.0,
            "linear": 1.0 - p,
            "cosine": (1.0 + math.cos(math.pi * p)) / 2.0,
            "step": 1.0 if p < 0.5 else 0.1 if p < 0.75 else 0.01,
        }[decay]
    )


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine", "step"])
@pytest.mark.parametrize(
    ("warmup", "total"), [(0, _TOTAL), (1, _TOTAL), (100, _TOTAL), (_TOTAL, _TOTAL), (20, 10)]
)
def test_a_schedule_follows_its_formula(decay, warmup, total):
    schedule = WarmupSchedule(_PEAK, decay, warmup, total)
    steps = sorted({0, 1, warmup - 1, warmup, warmup + 1, 99, 550, 551, 774, 776, 999, 1000, 2000})
    steps = [step for step in steps if step >= 0]
    rates = [float(schedule(tf.constant(step, tf.int64))) for step in steps]
    expected = [_by_formula(decay, step, warmup, total) for step in steps]
    np.testing.assert_allclose(rates, expected, rtol=1e-5, atol=1e-7)


def test_decays_end_where_they_should():
    ends = {
        decay: float(WarmupSchedule(_PEAK, decay, 10, _TOTAL)(_TOTAL))
        for decay in ("constant", "linear", "cosine", "step")
    }
    expected = {"constant": _PEAK, "linear": 0.0, "cosine": 0.0, "step": _PEAK / 100}
    assert ends == pytest.approx(expected, abs=1e-7)


def test_a_schedule_is_restored_from_its_config():
    schedule = WarmupSchedule(_PEAK, "cosine", 10, _TOTAL)
    optimizer = keras.optimizers.SGD(schedule)
    copy = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    again = copy._learning_rate
    assert isinstance(again, WarmupSchedule)
    assert again.get_config() == schedule.get_config()


class _Table(keras.optimizers.schedules.LearningRateSchedule):
    """Knows of no step before the first."""

    def __call__(self, step):
        return tf.gather(tf.constant([0.5, 0.25, 0.125]), tf.cast(step, tf.int32))


@pytest.mark.parametrize(
    ("rate", "further", "rates"),
    [
        (0.5, {}, [0.5, 0.5, 0.5]),
        (lambda: 0.5, {}, [0.5, 0.5, 0.5]),
        (_Table(), {}, [0.5, 0.5, 0.25]),
        (_Table(), {"gradient_accumulation_steps": 2}, [0.5, 0.5, 0.25]),
    ],
    ids=["number", "function", "schedule", "accumulated"],
)
def test_the_rate_of_the_last_update_is_known_whatever_gives_it(rate, further, rates):
    optimizer = keras.optimizers.SGD(rate, **further)
    weight = keras.Variable([1.0])
    optimizer.build([weight])
    found = [float(last_rate(optimizer))]
    for _ in range(2):
        optimizer.apply([tf.constant([1.0])])
        found.append(float(last_rate(optimizer)))
    assert found == rates


def test_an_optimizer_takes_the_rate_of_its_update():
    optimizer = make("sgd", learning_rate=1.0, lr_schedule="linear", warmup_steps=2, total_steps=6)
    weight = keras.Variable(0.0)
    values = [0.0]
    for _ in range(6):
        optimizer.apply([tf.constant(-1.0)], [weight])
        values.append(float(weight.numpy()))
    assert np.diff(values) == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25])


def test_without_a_schedule_the_rate_is_a_number():
    optimizer = make("sgd", learning_rate=0.25, total_steps=10)
    assert float(optimizer.learning_rate.numpy()) == 0.25
    assert not isinstance(optimizer._learning_rate, WarmupSchedule)


@pytest.mark.parametrize("name", ["SGD", "AdamW", *optimizers.by_name()])
def test_every_optimizer_of_keras_learns_by_its_name(name):
    optimizer = make(name, learning_rate=0.1, weight_decay=0.01, clip_norm=1.0, ema=0.9)
    assert type(optimizer).__name__.lower() == name.lower()
    weight = keras.Variable(np.ones((2, 2), np.float32))
    optimizer.build([weight])
    optimizer.apply([tf.ones((2, 2))], [weight])
    assert np.all(weight.numpy() < 1.0)


@pytest.mark.parametrize("name", ["", "sgdd", "optimizer", "LossScaleOptimizer", "schedules"])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(UsageError, match=r"is not one of adadelta, .*adam, .*sgd") as caught:
        make(name, learning_rate=0.1)
    assert f"optimizer={name!r}" in str(caught.value)
    listed = str(caught.value).partition("one of")[2]
    assert "lossscaleoptimizer" not in listed
    assert "multioptimizer" not in listed


def test_weight_decay_is_the_optimizers_own_unless_given():
    assert make("adamw", learning_rate=0.1).weight_decay == keras.optimizers.AdamW().weight_decay
    assert make("sgd", learning_rate=0.1).weight_decay is None
    assert make("adamw", learning_rate=0.1, weight_decay=0.5).weight_decay == 0.5
    assert make("adamw", learning_rate=0.1, weight_decay=0.0).weight_decay == 0.0


def test_clipping_is_by_the_global_norm():
    optimizer = make("sgd", learning_rate=1.0, clip_norm=1.0)
    weights = [keras.Variable(0.0), keras.Variable(0.0)]
    optimizer.apply([tf.constant(3.0), tf.constant(4.0)], weights)
    assert [float(w.numpy()) for w in weights] == pytest.approx([-0.6, -0.8])


def _model(strategy):
    with strategy.scope():
        model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
        optimizer = make("sgd", learning_rate=1.0, ema=0.5)
        optimizer.build(model.trainable_variables)
    return model, optimizer


@pytest.mark.parametrize("replicas", [1, 2])
def test_the_model_has_its_averaged_weights_for_a_while(replicas):
    strategy = tf.distribute.get_strategy()
    if replicas == 2:
        strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    model, optimizer = _model(strategy)
    (weight,), (average,) = model.trainable_variables, optimizer._model_variables_moving_average
    weight.assign([[3.0]])
    average.assign([[5.0]])

    def local(variable):
        copies = strategy.experimental_local_results(variable.value)
        return [copy.numpy().item() for copy in copies]

    with optimizers.averaged_weights(strategy, model, optimizer):
        assert local(weight) == [5.0] * replicas
    assert (local(weight), local(average)) == ([3.0] * replicas, [5.0] * replicas)
    with (
        pytest.raises(KeyError),
        optimizers.averaged_weights(strategy, model, optimizer),
    ):
        raise KeyError
    assert (local(weight), local(average)) == ([3.0] * replicas, [5.0] * replicas)


def test_without_an_average_the_weights_stay():
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    optimizer = make("sgd", learning_rate=1.0)
    before = model.get_weights()
    with optimizers.averaged_weights(tf.distribute.get_strategy(), model, optimizer):
        np.testing.assert_equal(model.get_weights(), before)


def test_further_arguments_reach_the_optimizer_in_the_type_of_their_default():
    optimizer = make("sgd", learning_rate=0.1, further={"momentum": 1, "nesterov": True})
    assert (optimizer.momentum, optimizer.nesterov) == (1.0, True)
    optimizer = make("adam", learning_rate=0.1, further={"beta_2": 0.95, "clipnorm": 2.0})
    assert (optimizer.beta_2, optimizer.clipnorm) == (0.95, 2.0)


@pytest.mark.parametrize(
    ("further", "message"),
    [
        ({"momentun": 0.9}, "adam has no 'momentun'; it has amsgrad, beta_1, beta_2, clipnorm,"),
        ({"beta_1": "high"}, "beta_1='high' is a str; use a float such as 0.9"),
        ({"amsgrad": 1}, "amsgrad=1 is a int; use a bool such as False"),
        ({"learning_rate": 1.0}, "learning_rate is not set there; see --learning_rate"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps is not set there"),
    ],
)
def test_further_arguments_that_do_not_fit_are_explained(further, message):
    with pytest.raises(UsageError, match=message):
        make("adam", learning_rate=0.1, further=further)


def test_two_kinds_of_clipping_are_refused_in_one_line():
    with pytest.raises(UsageError, match=r"^optimizer=sgd: [^\n]*clipnorm"):
        make("sgd", learning_rate=0.1, clip_norm=1.0, further={"clipnorm": 1.0})
