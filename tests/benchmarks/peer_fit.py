"""Peer: Keras's `model.fit`.

jit: with jit_compile=True; many: with steps_per_execution=100 too, which is what makes `fit`
fastest here; mirrored: on two logical CPU devices.
"""

import contextlib

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
    begun = workload.start()
    work, (x, y) = begun.work, begun.train
    options = {"jit_compile": True} if "jit" in begun.how or "many" in begun.how else {}
    if "many" in begun.how:
        options["steps_per_execution"] = min(100, work.steps)
    scope = contextlib.nullcontext()
    if "mirrored" in begun.how:
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * 2
        )
        scope = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope()
    with scope:
        model = work.keras_model()
        model.compile(
            optimizer=work.keras_optimizer(),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            **options,
        )
    model.fit(x, y, batch_size=work.batch, epochs=1, verbose=0)
    loss = workload.keras_loss(model, begun.held)
    watch = Watch()
    model.fit(x, y, batch_size=work.batch, epochs=begun.epochs, verbose=0, callbacks=[watch])
    workload.report(steps=begun.epochs * work.steps, seconds=watch.seconds, loss=loss)


if __name__ == "__main__":
    main()
