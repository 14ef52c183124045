"""Layers: what the layers of a model demand of the step."""

import contextlib
from collections.abc import Iterator

import keras
import numpy as np
import tensorflow as tf

from dist_train.errors import UsageError

# Elements of a variable in which a layer may count something.
_SMALL = 1 << 20
_CONVOLUTIONS = (
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
    keras.layers.Conv1DTranspose,
    keras.layers.Conv2DTranspose,
    keras.layers.Conv3DTranspose,
    keras.layers.DepthwiseConv1D,
    keras.layers.DepthwiseConv2D,
    keras.layers.SeparableConv1D,
    keras.layers.SeparableConv2D,
    keras.layers.ConvLSTM1D,
    keras.layers.ConvLSTM2D,
    keras.layers.ConvLSTM3D,
)


def all_layers(model: keras.Model) -> list[keras.layers.Layer]:
    """The layers of a model, those inside other layers included."""
    return list(model._flatten_layers(include_self=False, recursive=True))


def choose_jit(
    mode: str,
    model: keras.Model,
    *,
    gpu: bool,
    replicas: int,
    strings: bool,
) -> tuple[bool, str]:
    """(compile with XLA?, why).

    Args:
      mode: auto, true or false.
      model: whose layers decide.
      gpu: whether it runs on GPUs.
      replicas: how many there are.
      strings: whether the examples have strings.
    """
    if mode != "auto":
        return mode == "true", "asked for"
    if strings:
        return False, "XLA has no strings"
    layers = all_layers(model)
    if replicas > 1 and any(getattr(layer, "synchronized", False) for layer in layers):
        return False, "synchronized batch normalization communicates within the model"
    if not gpu and any(isinstance(layer, _CONVOLUTIONS) for layer in layers):
        return False, "on CPU, XLA's gradient of a convolution is many times slower"
    return True, "every layer suits it"


def padding(*, batch_size: int, examples: int, replicas: int, parts: int = 1) -> str | None:
    """Why a replica's share of a batch, or a part of it, may be padded, and what to do; or None."""
    divisor = replicas * parts
    if not batch_size % divisor and not examples % batch_size:
        return None
    fitting = [
        size
        for size in range(divisor, min(examples, 8 * batch_size) + 1, divisor)
        if examples % size == 0
    ]
    near = sorted(sorted(fitting, key=lambda size: abs(size - batch_size))[:4])
    remedy = f"use {' or '.join(map(str, near))}" if near else "change the number of examples"
    split = f" in {parts} parts" if parts > 1 else ""
    return (
        f"batch_size={batch_size} must divide {examples} examples and be divisible by"
        f" {replicas} replicas{split}; {remedy}"
    )


def check_batch_statistics(
    model: keras.Model, *, batch_size: int, examples: int, replicas: int, parts: int = 1
) -> None:
    """Refuses what would let padding, or the number of replicas, change batch statistics.

    Raises:
      UsageError: the model normalizes over the batch, and a batch would be padded, or the replicas
        would gather statistics of their own. The batch sizes that work are named.
    """
    layers = [  # a frozen one uses the statistics that it has
        layer
        for layer in all_layers(model)
        if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable
    ]
    if not layers:
        return
    if parts > 1:
        raise UsageError(
            f"{layers[0].name} normalizes over the batch, and would over each of"
            f" {parts} parts alone; use --gradient_accumulation=1"
        )
    padded = padding(batch_size=batch_size, examples=examples, replicas=replicas)
    if padded is not None:
        raise UsageError(
            f"{layers[0].name} normalizes over the batch, which padding would change: {padded}"
        )
    if replicas > 1 and not all(layer.synchronized for layer in layers):
        raise UsageError(
            f"{layers[0].name} would gather statistics of its own on each of {replicas} replicas;"
            " use BatchNormalization(synchronized=True)"
        )


@contextlib.contextmanager
def unchanged(strategy: tf.distribute.Strategy, model: keras.Model) -> Iterator[None]:
    """Undoes what calls of the model in the body count, gather or draw.

    That lies in small variables; a large one that is not trained is a layer that was frozen.
    """
    trained = {id(variable) for variable in model.trainable_variables}
    kept = [
        (variable, np.array(variable.numpy()))
        for variable in model.variables
        if id(variable) not in trained and np.prod(variable.shape) <= _SMALL
    ]
    try:
        yield
    finally:
        with strategy.scope():
            for variable, value in kept:
                if not np.array_equal(variable.numpy(), value):
                    variable.assign(value)


def random_states(model: keras.Model) -> list[keras.Variable]:
    """The states of the model's random generators (dropout's, say).

    Keras keeps them apart from the variables that tf.train.Checkpoint finds, so a checkpoint of the
    model alone would repeat masks after a resume.
    """
    return [v for v in model.variables if v.path.endswith("seed_generator_state")]


def separate_randomness(strategy: tf.distribute.Strategy, model: keras.Model) -> None:
    """Lets each replica draw its own random numbers; Keras gives all of them the same.

    A generator's state is (seed, counter). Replica r adds a multiple of r to the seed; the counter
    advances alike on all. The first replica's state is unchanged, and it is what a checkpoint
    holds, so this is done after every restore.
    """
    states = random_states(model)
    if not states or strategy.num_replicas_in_sync == 1:
        return

    @tf.function(autograph=False)
    def separate() -> None:
        def replica() -> None:
            number = tf.distribute.get_replica_context().replica_id_in_sync_group
            for state in states:
                shift = tf.cast(number, state.dtype) * tf.constant([1_000_003, 0], state.dtype)
                state.assign(state.value + shift)

        strategy.run(replica)

    separate()
