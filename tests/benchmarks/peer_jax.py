"""Peer: JAX, an epoch as one jitted `lax.scan` over steps, the examples on the device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import workload


def forward(params, x):
    """[b, 784] -> [b, 10] logits."""
    for weights, biases in params[:-1]:
        if weights.ndim == 4:
            x = x.reshape(len(x), 28, 28, 1) if x.ndim == 2 else x
            x = jax.lax.conv_general_dilated(
                x, weights, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = jax.nn.relu(x + biases)
            window = (1, 2, 2, 1)
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, window, "VALID")
        else:
            x = jax.nn.relu(x @ weights + biases)
    weights, biases = params[-1]
    return x.reshape(len(x), -1) @ weights + biases


def example_losses(params, x, y):
    """[b] cross-entropies."""
    log_probabilities = jax.nn.log_softmax(forward(params, x))
    return -jnp.take_along_axis(log_probabilities, y[:, None], axis=1)[:, 0]


def first_state(work, params):
    """What the optimizer starts with."""
    zeros = jax.tree.map(jnp.zeros_like, params)
    return () if work.optimizer == "sgd" else (jnp.float32(0), zeros, jax.tree.map(jnp.copy, zeros))


def update(work, params, gradients, state):
    """(params, state) after a step of SGD or of Adam (Kingma and Ba, 2015, section 2)."""
    rate = work.learning_rate
    if work.optimizer == "sgd":
        return jax.tree.map(lambda p, g: p - rate * g, params, gradients), ()
    count, first, second = state
    count += 1
    first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, gradients)
    second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, second, gradients)
    rate *= jnp.sqrt(1 - 0.999**count) / (1 - 0.9**count)
    params = jax.tree.map(
        lambda p, m, v: p - rate * m / (jnp.sqrt(v) + 1e-7), params, first, second
    )
    return params, (count, first, second)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def epoch(work, params, state, key, x, y):
    """(params, state after an epoch, losses [steps]); the last batch is padded with weight 0."""
    padding = jnp.full(work.steps * work.batch - work.examples, -1)
    order = jnp.concatenate([jax.random.permutation(key, work.examples), padding])

    def step(carry, ids):
        params, state = carry
        weights = (ids >= 0).astype(jnp.float32)
        x_batch, y_batch = x[ids], y[ids]

        def mean_loss(params):
            return (example_losses(params, x_batch, y_batch) * weights).sum() / weights.sum()

        loss, gradients = jax.value_and_grad(mean_loss)(params)
        return update(work, params, gradients, state), loss

    (params, state), losses = jax.lax.scan(
        step, (params, state), order.reshape(work.steps, work.batch)
    )
    return params, state, losses


def main() -> None:
    begun = workload.start()
    work, (x, y) = begun.work, begun.train
    images, labels = jnp.asarray(x), jnp.asarray(y)
    params = jax.tree.map(jnp.asarray, work.glorot(np.random.default_rng(0)))
    state = first_state(work, params)
    keys = jax.random.split(jax.random.key(0), 1 + begun.epochs)

    params, state, losses = epoch(work, params, state, keys[0], images, labels)
    held_loss = float(example_losses(params, *begun.held).mean())
    clock = workload.Clock()
    for key in keys[1:]:
        params, state, losses = epoch(work, params, state, key, images, labels)
        print(f"loss {float(losses.mean()):.4f}")
    workload.report(steps=begun.epochs * work.steps, seconds=clock.seconds(), loss=held_loss)


if __name__ == "__main__":
    main()
