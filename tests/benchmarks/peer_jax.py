"""Peer: JAX, an epoch as one jitted `lax.scan` over steps, the examples on the device.

peer_jax.py DATA EPOCHS
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import workload


def forward(params, x):
    """[b, 784] -> [b, 10] logits."""
    for weights, biases in params[:-1]:
        x = jax.nn.relu(x @ weights + biases)
    weights, biases = params[-1]
    return x @ weights + biases


def example_losses(params, x, y):
    """[b] cross-entropies."""
    log_probabilities = jax.nn.log_softmax(forward(params, x))
    return -jnp.take_along_axis(log_probabilities, y[:, None], axis=1)[:, 0]


@functools.partial(jax.jit, donate_argnums=0)
def epoch(params, key, x, y):
    """(params after an epoch, losses [STEPS]); the last batch is padded with weight 0."""
    padding = jnp.full(workload.STEPS * workload.BATCH - workload.EXAMPLES, -1)
    order = jnp.concatenate([jax.random.permutation(key, workload.EXAMPLES), padding])

    def step(params, ids):
        weights = (ids >= 0).astype(jnp.float32)
        x_batch, y_batch = x[ids], y[ids]

        def mean_loss(params):
            return (example_losses(params, x_batch, y_batch) * weights).sum() / weights.sum()

        loss, gradients = jax.value_and_grad(mean_loss)(params)
        update = functools.partial(jax.tree.map, lambda p, g: p - workload.LEARNING_RATE * g)
        return update(params, gradients), loss

    return jax.lax.scan(step, params, order.reshape(workload.STEPS, workload.BATCH))


def main() -> None:
    (x, y), held = workload.start()
    epochs = int(sys.argv[2])
    images, labels = jnp.asarray(x), jnp.asarray(y)
    params = jax.tree.map(jnp.asarray, workload.glorot(np.random.default_rng(0)))
    keys = jax.random.split(jax.random.key(0), 1 + epochs)

    params, losses = epoch(params, keys[0], images, labels)
    held_loss = float(example_losses(params, *held).mean())
    clock = workload.Clock()
    for key in keys[1:]:
        params, losses = epoch(params, key, images, labels)
        print(f"loss {float(losses.mean()):.4f}")
    workload.report(steps=epochs * workload.STEPS, seconds=clock.seconds(), loss=held_loss)


if __name__ == "__main__":
    main()
