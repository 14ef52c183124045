"""Peer: the loop of Keras's guide 'Writing a training loop from scratch in TensorFlow'.

https://keras.io/guides/writing_a_custom_training_loop_in_tensorflow/, its first, eager loop.
"""

import keras
import tensorflow as tf
import workload


def main() -> None:
    begun = workload.start()
    work = begun.work
    model = work.keras_model()
    optimizer = work.keras_optimizer()
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    dataset = tf.data.Dataset.from_tensor_slices(begun.train)
    dataset = dataset.shuffle(buffer_size=1024).batch(work.batch)

    def epoch() -> None:
        for step, (x_batch, y_batch) in enumerate(dataset):
            with tf.GradientTape() as tape:
                logits = model(x_batch, training=True)
                loss_value = loss_fn(y_batch, logits)
            grads = tape.gradient(loss_value, model.trainable_weights)
            optimizer.apply(grads, model.trainable_weights)
            if step % 200 == 0:
                print(f"Training loss (for one batch) at step {step}: {float(loss_value):.4f}")

    epoch()
    loss = workload.keras_loss(model, begun.held)
    clock = workload.Clock()
    for _ in range(begun.epochs):
        epoch()
    workload.report(steps=begun.epochs * work.steps, seconds=clock.seconds(), loss=loss)


if __name__ == "__main__":
    main()
