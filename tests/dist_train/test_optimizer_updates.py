"""An optimizer's update within a step: Keras's own, on every replica."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from dist_train import optimizers

KERNEL = np.arange(1, 7, dtype=np.float32).reshape(2, 3) / 10
BIAS = np.ones(3, np.float32)
GRADIENTS = [(np.sin(KERNEL * 10 + step), step * (BIAS - 0.7 * KERNEL[1])) for step in range(4)]
OPTIMIZERS = keras.optimizers
OF_THEIR_OWN = {
    "nadam, a product over the steps": lambda: OPTIMIZERS.Nadam(0.1, use_ema=True),
    "muon, two kinds of decay": lambda: OPTIMIZERS.Muon(
        0.1, weight_decay=0.2, adam_weight_decay=0.3
    ),
    "an optimizer of optimizers": lambda: OPTIMIZERS.MultiOptimizer(
        OPTIMIZERS.OptimizerMap(OPTIMIZERS.Adam(0.1), {".*bias": OPTIMIZERS.Nadam(0.2)})
    ),
    "accumulation": lambda: OPTIMIZERS.SGD(0.1, gradient_accumulation_steps=2),
    "overwriting by the average": lambda: OPTIMIZERS.SGD(
        0.1, use_ema=True, ema_overwrite_frequency=2
    ),
}


def built(make):
    variables = [keras.Variable(KERNEL, name="kernel"), keras.Variable(BIAS, name="bias")]
    optimizer = make()
    optimizer.build(variables)
    return variables, optimizer


def assert_updates_as_keras_does(make, replicas):
    expected, optimizer = built(make)
    for gradients in GRADIENTS:
        optimizer.apply([tf.constant(each) for each in gradients], expected)

    strategy = tf.distribute.get_strategy()
    if replicas > 1:
        strategy = tf.distribute.MirroredStrategy([f"CPU:{index}" for index in range(replicas)])
    with strategy.scope():
        variables, optimizer = built(make)
    optimizers.update_locally(optimizer)

    @tf.function(autograph=False)
    def step(*gradients):
        strategy.run(lambda *each: optimizer.apply(list(each), variables), args=gradients)

    for gradients in GRADIENTS:
        step(*map(tf.constant, gradients))
    for variable, right in zip(variables, expected, strict=True):
        copies = strategy.experimental_local_results(variable.value)
        assert len(copies) == replicas
        for copy in copies:
            np.testing.assert_allclose(copy.numpy(), right.numpy(), rtol=1e-5, atol=1e-6)
    assert not np.allclose(expected[0].numpy(), KERNEL, atol=1e-4)


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("make", OF_THEIR_OWN.values(), ids=OF_THEIR_OWN)
def test_what_an_optimizer_has_of_its_own_counts(make, replicas):
    assert_updates_as_keras_does(make, replicas)


@pytest.mark.slow
@pytest.mark.parametrize("name", optimizers.by_name())
def test_every_optimizer_updates_three_replicas_as_keras_does_one(name):
    assert_updates_as_keras_does(
        lambda: optimizers.make(name, learning_rate=0.1, weight_decay=0.1, clip_norm=0.5, ema=0.9),
        3,
    )
