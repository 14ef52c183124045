"""Peer: Keras's `model.fit`.

    peer_fit.py DATA EPOCHS [fast] [mirrored]

fast: with jit_compile=True, steps_per_execution=100, which is what makes `fit` fastest here;
mirrored: on two logical CPU devices.
"""

import contextlib
import sys

import keras
import tensorflow as tf
import workload


class Watch(keras.callbacks.Callback):
    """The seconds from the begin of the first epoch to the end of the last."""

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 0:
            self.clock = workload.Clock()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds = self.clock.seconds()


def main() -> None:
    (x, y), held = workload.start()
    epochs, how = int(sys.argv[2]), sys.argv[3:]
    options = {"jit_compile": True, "steps_per_execution": 100} if "fast" in how else {}
    scope = contextlib.nullcontext()
    if "mirrored" in how:
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * 2
        )
        scope = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope()
    with scope:
        model = workload.keras_model()
        model.compile(
            optimizer=keras.optimizers.SGD(workload.LEARNING_RATE),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            **options,
        )
    model.fit(x, y, batch_size=workload.BATCH, epochs=1, verbose=0)
    loss = workload.keras_loss(model, held)
    watch = Watch()
    model.fit(x, y, batch_size=workload.BATCH, epochs=epochs, verbose=0, callbacks=[watch])
    workload.report(steps=epochs * workload.STEPS, seconds=watch.seconds, loss=loss)


if __name__ == "__main__":
    main()
