"""One worker of those that `scaling.py` starts.

For each object of JSON on a line of standard input, the same on all workers, it does what that says
and prints as a list what it took each of `repeats` times, in seconds:

    what: exchange, size: 1000                bytes around a ring of plain sockets: a hop
    what: reduce, size: 1000, hint: AUTO      floats, by the reduction of the training step
                                              (hint GRID: in two rings)
    what: train, size: 10000000, batch: 64, buckets: 4, compiled: false     weights: a step

The cluster is that of TF_CONFIG. `exchange` uses the port beside the worker's own.
"""

import functools
import itertools
import json
import os
import socket
import sys
import threading
import time

import numpy as np
import tensorflow as tf

from dist_train import allocator, environments, reduction, replicas

# A call lasts about this long, so that its own cost, and the clock's, do not count.
_CALL_S = 0.05
_LONGEST = 200


class Ring:
    """Sockets to the next worker and from the one before; what TensorFlow's ring needs of a link.

    Args:
      addresses: of the workers, 'host:port'.
      index: which of them this is.
    """

    def __init__(self, addresses, index):
        places = [
            (host, int(port) + 1) for host, _, port in (each.rpartition(":") for each in addresses)
        ]
        listener = socket.create_server(places[index])
        self._next = socket.socket()
        while self._next.connect_ex(places[(index + 1) % len(places)]) != 0:
            time.sleep(0.01)
            self._next = socket.socket()
        self._previous, _ = listener.accept()
        for each in (self._next, self._previous):
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def hop(self, message):
        """Sends a message, and receives one of the same size."""
        # Not from this thread: once the buffers are full, all would send and nobody would receive.
        sender = None
        if len(message) <= 4096:
            self._next.sendall(message)
        else:
            sender = threading.Thread(target=self._next.sendall, args=(message,))
            sender.start()
        view = memoryview(bytearray(len(message)))
        while view:
            view = view[self._previous.recv_into(view) :]
        if sender is not None:
            sender.join()


class Worker:
    """Does what `scaling.py` asks for, at the same time as the others.

    Args:
      cluster: see dist_train.cluster.
    """

    def __init__(self, cluster):
        self._cluster = cluster
        self._ring = Ring(cluster.addresses, cluster.index)
        self._strategy = replicas.create("multi_worker", 0, cluster)
        self._sum = tf.function(
            lambda value: self._strategy.run(all_reduce, args=(value, "AUTO")), autograph=False
        )
        if self._least(1.0 + cluster.index) != 1.0:
            raise AssertionError("the reduction does not add up")

    def answer(self, *, what, repeats, **order):
        """Does what it is asked for; seconds, one for each repeat."""
        does = {"exchange": self._exchange, "reduce": self._reduction, "train": self._training}
        return self._seconds_each(does[what](**order), repeats)

    def _seconds_each(self, run, repeats):
        """What one of many takes: the means of `repeats` calls of run(n), which does it n times."""
        run(1)
        times = []
        count = 2
        for repeat in range(-2, repeats):
            self._least(0.0)  # so that all begin at about the same time
            begin = time.perf_counter()
            run(count)
            seconds = (time.perf_counter() - begin) / count
            if repeat < 0:
                # All workers must do the same number: the slowest of them decides.
                count = max(3, min(_LONGEST, int(self._least(_CALL_S / seconds))))
            else:
                times.append(seconds)
        return times

    def _least(self, value):
        """The least of all workers' values."""
        rows = np.zeros(len(self._cluster.addresses), np.float32)
        rows[self._cluster.index] = value
        return float(np.min(self._sum(tf.constant(rows)).numpy()))

    def _exchange(self, size):
        message = bytes(size)

        def run(count):
            for _ in range(count):
                self._ring.hop(message)

        return run

    def _reduction(self, size, hint):
        if hint == "GRID":
            grid = reduction.grid(len(self._cluster.addresses))
            reduce = reduction.in_two_rings(self._cluster.index, *grid, size)
        else:
            reduce = functools.partial(all_reduce, hint=hint)
        # A sum of zeros is again zeros, and the next step's input: nothing is copied for it.
        return self._loop(reduce, tf.zeros([size]))

    def _training(self, size, **how):
        with self._strategy.scope():
            model = Perceptron(size, **how)
        return self._loop(model.step, tf.constant(0))

    def _loop(self, step, state):
        """fn(n): n steps, each state -> state in replica context, looped over as in dist_train."""

        @tf.function(autograph=False)
        def run(count):
            return tf.while_loop(
                lambda number, _: number < count,
                lambda number, state: (number + 1, self._strategy.run(step, args=(state,))),
                (0, state),
                parallel_iterations=1,
            )[0]

        return lambda count: run(tf.constant(count)).numpy()


def all_reduce(value, hint="AUTO"):
    """The sum over the workers as dist_train.step has it; in replica context."""
    options = tf.distribute.experimental.CommunicationOptions(
        implementation=tf.distribute.experimental.CommunicationImplementation[hint]
    )
    context = tf.distribute.get_replica_context()
    return context.all_reduce(tf.distribute.ReduceOp.SUM, tf.identity(value), options)


class Perceptron:
    """A multilayer perceptron of about so many weights, trained on random numbers with SGD.

    Args:
      weights: their number.
      batch: examples of this worker.
      buckets: the gradients are reduced in so many messages, each as soon as it is whole; 0: they
        are not reduced.
      compiled: whether XLA compiles the forward and backward pass, as dist_train does; then no
        message leaves before the pass is over.
    """

    _INPUTS, _LAYERS, _CLASSES = 256, 8, 10

    def __init__(self, weights, batch, buckets, compiled):
        width = int((weights / self._LAYERS) ** 0.5)
        sizes = [self._INPUTS, *[width] * (self._LAYERS + 1), self._CLASSES]
        generator = np.random.default_rng(0)
        self._weights = [
            tf.Variable((generator.standard_normal(shape) / shape[0] ** 0.5).astype(np.float32))
            for shape in itertools.pairwise(sizes)
        ]
        self._x = tf.constant(generator.standard_normal((batch, sizes[0])).astype(np.float32))
        self._y = tf.constant(generator.integers(0, self._CLASSES, batch))
        # The last layers' gradients are there first.
        backward = list(reversed(range(len(self._weights))))
        self._buckets = [list(part) for part in np.array_split(backward, max(1, buckets))]
        self._reduce = all_reduce if buckets else tf.identity
        self._gradients = self._vectors
        if compiled:
            self._gradients = tf.function(self._vectors, jit_compile=True, autograph=False)

    def _vectors(self):
        """The gradients of each bucket, end to end."""
        with tf.GradientTape() as tape:
            hidden = self._x
            for weights in self._weights[:-1]:
                hidden = tf.nn.relu(hidden @ weights)
            logits = hidden @ self._weights[-1]
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(self._y, logits)
            loss = tf.reduce_mean(losses)
        gradients = tape.gradient(loss, self._weights)
        return [
            tf.concat([tf.reshape(gradients[number], [-1]) for number in bucket], 0)
            for bucket in self._buckets
        ]

    def step(self, state):
        """Updates the weights; in replica context."""
        for bucket, vector in zip(self._buckets, self._gradients(), strict=True):
            sizes = [int(np.prod(self._weights[number].shape)) for number in bucket]
            parts = tf.split(self._reduce(vector), sizes)
            for number, part in zip(bucket, parts, strict=True):
                variable = self._weights[number]
                variable.assign_sub(1e-4 * tf.reshape(part, variable.shape))
        return state


def main():
    with allocator.keeping_memory(os.environ):  # as dist_train does after its first step
        worker = Worker(environments.find_cluster(os.environ, "multi_worker", 60.0))
        print(json.dumps("ready"), flush=True)
        for line in sys.stdin:
            print(json.dumps(worker.answer(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
