"""Peer: the loop of Keras's guide 'Writing a training loop from scratch in TensorFlow'.

    peer_guide.py DATA

https://keras.io/guides/writing_a_custom_training_loop_in_tensorflow/, its first, eager loop.
"""

import keras
import tensorflow as tf
import workload

WARM_UP_STEPS = 100  # nothing is compiled, and an epoch takes long


def main() -> None:
    (x, y), held = workload.start()
    model = workload.keras_model()
    optimizer = keras.optimizers.SGD(learning_rate=workload.LEARNING_RATE)
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    dataset = tf.data.Dataset.from_tensor_slices((x, y))
    dataset = dataset.shuffle(buffer_size=1024).batch(workload.BATCH)

    clock = workload.Clock()
    for step, (x_batch, y_batch) in enumerate(dataset):
        if step == WARM_UP_STEPS:
            clock = workload.Clock()
        with tf.GradientTape() as tape:
            logits = model(x_batch, training=True)
            loss_value = loss_fn(y_batch, logits)
        grads = tape.gradient(loss_value, model.trainable_weights)
        optimizer.apply(grads, model.trainable_weights)
        if step % 200 == 0:
            print(f"Training loss (for one batch) at step {step}: {float(loss_value):.4f}")
    seconds = clock.seconds()
    loss = workload.keras_loss(model, held)
    workload.report(steps=workload.STEPS - WARM_UP_STEPS, seconds=seconds, loss=loss)


if __name__ == "__main__":
    main()
