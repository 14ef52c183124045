"""Peer: TensorFlow's tutorials 'Custom training with tf.distribute.Strategy' and its sequel.

https://www.tensorflow.org/tutorials/distribute/custom_training and …/multi_worker_with_ctl: a
tf.function that takes a batch from a distributed iterator and calls strategy.run, once a step.
mirrored: on two logical CPU devices; multi_worker: one process of the cluster in TF_CONFIG.
"""

import json
import os

import keras
import tensorflow as tf
import workload


def make_strategy(how: list[str]) -> tf.distribute.Strategy:
    """Must come before any other operation of TensorFlow's."""
    if "multi_worker" in how:
        return tf.distribute.MultiWorkerMirroredStrategy()
    if "mirrored" in how:
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * 2
        )
        return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    return tf.distribute.get_strategy()


def main() -> None:
    begun = workload.start()
    work = begun.work
    strategy = make_strategy(begun.how)
    # repeat(): under several workers the end of a dataset would cost a collective at every step.
    dataset = tf.data.Dataset.from_tensor_slices(begun.train)
    dataset = dataset.shuffle(1024, seed=0).batch(work.batch).repeat()
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    iterator = iter(strategy.experimental_distribute_dataset(dataset.with_options(options)))

    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = work.keras_model()
        optimizer = work.keras_optimizer()
        loss_object = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=None)

    @tf.function
    def train_step(iterator):
        def step_fn(inputs):
            images, labels = inputs
            with tf.GradientTape() as tape:
                losses = loss_object(labels, model(images, training=True))
                loss = tf.nn.compute_average_loss(losses, global_batch_size=work.batch)
            gradients = tape.gradient(loss, model.trainable_variables)
            optimizer.apply(gradients, model.trainable_variables)
            return loss

        per_replica_losses = strategy.run(step_fn, args=(next(iterator),))
        return strategy.reduce(tf.distribute.ReduceOp.SUM, per_replica_losses, axis=None)

    def epoch() -> float:
        total_loss = 0.0
        for _ in range(work.steps):
            total_loss += train_step(iterator)
        return float(total_loss) / work.steps

    epoch()
    loss = workload.keras_loss(model, begun.held)
    clock = workload.Clock()
    for _ in range(begun.epochs):
        print(f"loss {epoch():.4f}")
    seconds = clock.seconds()
    task = json.loads(os.environ.get("TF_CONFIG", "{}")).get("task", {})
    if task.get("index", 0) == 0:
        workload.report(steps=begun.epochs * work.steps, seconds=seconds, loss=loss)


if __name__ == "__main__":
    main()
