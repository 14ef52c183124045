"""Workers: what the processes of a run tell one another outside of the training step."""

from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf

from dist_train.cluster import Cluster
from dist_train.errors import UsageError


class Workers:
    """The processes of a run; all of them must make the same calls in the same order.

    Args:
      strategy: whose collectives carry the messages.
      cluster: None: this process is alone, and every call is answered at once.

    Attributes:
      count: how many there are.
      index: which of them this is.
    """

    def __init__(self, strategy: tf.distribute.Strategy, cluster: Cluster | None):
        self._strategy = strategy
        self._cluster = cluster
        self.count = 1 if cluster is None else len(cluster.addresses)
        self.index = 0 if cluster is None else cluster.index
        self._local = strategy.num_replicas_in_sync // self.count
        self._reduce = tf.function(
            self._sum, input_signature=[tf.TensorSpec([None], tf.int32)], autograph=False
        )

    @property
    def is_chief(self) -> bool:
        """Whether this one writes the log, the checkpoints and the exports."""
        return self.index == 0

    def name(self, index: int) -> str:
        """How messages call a worker."""
        return f"worker {index}" if self._cluster is None else self._cluster.name(index)

    def barrier(self) -> None:
        """Returns when all workers have called it."""
        if self.count > 1:
            self._reduce(tf.zeros([1], tf.int32)).numpy()

    def gather(self, values: Sequence[int]) -> np.ndarray:
        """[workers, values] uint32: each worker's numbers of 32 bits."""
        rows = np.zeros((self.count, len(values)), np.uint32)
        rows[self.index] = values
        if self.count == 1:
            return rows
        summed = self._reduce(tf.constant(rows.reshape(-1).view(np.int32)))
        return summed.numpy().view(np.uint32).reshape(rows.shape)

    def check_alike(self, values: Mapping[str, int]) -> None:
        """Raises UsageError if a worker's number of 32 bits is not the chief's; it is named."""
        if self.count == 1:
            return
        rows = self.gather(list(values.values()))
        for worker, row in enumerate(rows):
            for what, theirs, chiefs in zip(values, row, rows[0], strict=True):
                if theirs != chiefs:
                    raise UsageError(
                        f"{self.name(worker)} has other {what} (digest {theirs:08x}) than the chief"
                        f" ({chiefs:08x}); give all workers the same"
                    )

    def broadcast(self, variables: Sequence) -> None:
        """Gives every worker the chief's values, bit by bit, in one collective.

        Args:
          variables: tf.Variable or keras.Variable, alike on all workers but for their values.
        """
        if self.count == 1:
            return
        values = [np.asarray(variable.numpy()) for variable in variables]
        raw = b"".join(value.tobytes() for value in values)
        bits = np.frombuffer(raw + bytes(-len(raw) % 4), np.int32)
        # A sum in which the others take part with zeros keeps every bit of the chief's.
        sent = bits if self.is_chief else np.zeros_like(bits)
        received = self._reduce(tf.constant(sent)).numpy().tobytes()
        offset = 0
        with self._strategy.scope():
            for variable, value in zip(variables, values, strict=True):
                part = received[offset : offset + value.nbytes]
                variable.assign(np.frombuffer(part, value.dtype).reshape(value.shape))
                offset += value.nbytes

    def _sum(self, value: tf.Tensor) -> tf.Tensor:
        """The sum of each worker's [n] int32; of its replicas the first speaks for it."""

        def replica(value: tf.Tensor) -> tf.Tensor:
            context = tf.distribute.get_replica_context()
            first = context.replica_id_in_sync_group % self._local == 0
            part = tf.where(first, value, tf.zeros_like(value))
            return context.all_reduce(tf.distribute.ReduceOp.SUM, part)

        sums = self._strategy.run(replica, args=(value,))
        return self._strategy.experimental_local_results(sums)[0]
