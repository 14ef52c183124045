"""From a loop written by hand to a Task: the loop before, the task after, and the same numbers.

python tests/examples/migration_loop.py
dist-train --task=tests/examples/migration_loop.py:task --epochs=3 --noshuffle \
    --optimizer=adam --learning_rate=0.01 --clip_norm=0.5
"""

import keras
import numpy as np
import tensorflow as tf

import dist_train

RNG = np.random.default_rng(0)
X = RNG.uniform(-1, 1, (1000, 4)).astype(np.float32)  # the last of 16 batches has 40
Y = np.sin(3 * X).sum(axis=1)
X_VALID = RNG.uniform(-1, 1, (300, 4)).astype(np.float32)
Y_VALID = np.sin(3 * X_VALID).sum(axis=1)


def build_model():
    hidden = keras.layers.Dense(64, activation="tanh")
    return keras.Sequential([keras.Input((4,)), hidden, keras.layers.Dense(1)])


def squared(y, outputs):
    """[batch] squared errors: no mean over the batch."""
    return tf.square(outputs[:, 0] - y)


def before():
    keras.utils.set_random_seed(0)
    model, optimizer = build_model(), keras.optimizers.Adam(0.01)

    @tf.function
    def train_step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(squared(y, model(x, training=True)))
        gradients = tape.gradient(loss, model.trainable_variables)
        gradients, _ = tf.clip_by_global_norm(gradients, 0.5)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    batches, history = tf.data.Dataset.from_tensor_slices((X, Y)).batch(64), {"val_loss": []}
    for epoch in range(3):
        losses = [train_step(x, y) for x, y in batches]
        history["val_loss"].append(float(tf.reduce_mean(squared(Y_VALID, model(X_VALID)))))
        print(f"epoch {epoch + 1}: {losses[-1]:.4f}, validation {history['val_loss'][-1]:.4f}")
    return model, history


def task():
    train, validation = dist_train.Arrays(X, Y), dist_train.Arrays(X_VALID, Y_VALID)
    return dist_train.Task(model=build_model, train=train, validation=validation, loss=squared)


if __name__ == "__main__":
    before()
