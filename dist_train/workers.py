"""Workers: what the processes of a run tell one another outside of the training step."""

import contextlib
import re
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import tensorflow as tf
from absl import logging
from tensorflow.python.eager import context as eager

from dist_train import watchdog
from dist_train.cluster import Cluster
from dist_train.errors import RunError, UsageError, WorkerLost

_ANSWER_S = 5.0


class Workers:
    """The processes of a run; all of them must make the same calls in the same order.

    Args:
      strategy: whose collectives carry the messages.
      cluster: None: this process is alone, and every call is answered at once.
      stall_timeout_s: bound of each wait for the others, in seconds.

    Attributes:
      count: how many there are.
      index: which of them this is.
      replicas: how many they have in all.
      local_replicas: how many each of them has.
    """

    def __init__(
        self, strategy: tf.distribute.Strategy, cluster: Cluster | None, *, stall_timeout_s: float
    ):
        self._strategy = strategy
        self._cluster = cluster
        self._stall_timeout_s = stall_timeout_s
        self.count = 1 if cluster is None else len(cluster.addresses)
        self.index = 0 if cluster is None else cluster.index
        self.replicas = strategy.num_replicas_in_sync
        self.local_replicas = self.replicas // self.count
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

    @contextlib.contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Bounds a body in which the replicas wait for one another, and names what failed.

        Args:
          what: what the body does, for messages.

        Raises:
          RunError: a worker was lost, the memory does not suffice, or an operation failed.
        """
        try:
            with self._bound(what), self._named(what):
                yield
        except WorkerLost:
            if self.count > 2:  # who waits for this one hears from it which other one was lost
                time.sleep(watchdog.LINGER_S)
            raise

    def _bound(self, what: str) -> contextlib.AbstractContextManager[None]:
        message = f"{what}: more than {{seconds}}; raise --stall_timeout_s if that is right"
        return watchdog.bound(self._stall_timeout_s, message, explain=lambda: self._who_waits(what))

    @contextlib.contextmanager
    def _named(self, what: str) -> Iterator[None]:
        try:
            yield
        except tf.errors.ResourceExhaustedError as error:
            raise RunError(
                f"{what}: out of memory; use a smaller --batch_size, --gradient_accumulation"
                " or --input=stream"
            ) from error
        except tf.errors.OpError as error:
            text = " ".join(str(error.message).split())
            if self.count == 1 or _is_own(error, text):
                raise RunError(f"{what}: {essence(error)}") from error
            why = re.sub(r".*aborted by: |The error could be.*|Additional GRPC.*", "", text)
            raise WorkerLost(
                f"{what}: {self._lost(text)} was lost ({textwrap.shorten(why, 200)})"
            ) from error

    def leave(self) -> None:
        """Returns when all workers leave: one that exits early makes TensorFlow fail the others."""
        if self.count == 1:
            return
        with self.together("the end"):
            self._reduce(tf.zeros([1], tf.int32)).numpy()

    def log(self, level: int, text: str, *values: object) -> None:
        """Logs what all of them know, which the chief says for all."""
        logging.log(level if self.is_chief else logging.DEBUG, text, *values)

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

    def all_say(self, value: int) -> bool:
        """Whether all of them have the same number of 32 bits."""
        return len(set(self.gather([value]).ravel().tolist())) == 1

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

    def who_differs(self, digests: Sequence[int]) -> str:
        """Names the replicas whose numbers are not those of the most; all workers call it.

        Args:
          digests: of each replica of this worker, 32 bits.
        """
        rows = self.gather(digests)
        values, counts = np.unique(rows, return_counts=True)
        # Where no value has a majority, the chief's first replica is what others differ from.
        usual = values[np.argmax(counts)] if 2 * counts.max() > rows.size else rows[0, 0]
        found = []
        for worker, row in enumerate(rows):
            wrong = [str(replica) for replica, digest in enumerate(row) if digest != usual]
            if not wrong:
                continue
            which = "" if len(row) == 1 else f"replica {', '.join(wrong)} of "
            found.append(which + (self.name(worker) if self.count > 1 else "this process"))
        if 2 * counts.max() > rows.size:
            return f"{'; '.join(found)} differ{'s' if len(found) == 1 else ''} from the others"
        return f"{'; '.join(found)} differ{'s' if len(found) == 1 else ''} from the first"

    def _lost(self, message: str) -> str:
        """Which worker TensorFlow's message is about, as far as it says."""
        if "CoordinationService/Heartbeat" in message:
            # The others send theirs to the chief; who else is named heard of it.
            return self.name(0)

        def named(text: str) -> set[int]:
            return {int(number) for number in re.findall(r"/task:(\d+)", text)} - {self.index}

        # Who reports it is another one, if one more is named.
        found = named(re.sub(r"reported from /job:\S+", "", message)) or named(message)
        return ", ".join(self.name(index) for index in sorted(found) if index < self.count) or (
            "a worker"
        )

    def _who_waits(self, what: str) -> str:
        """Once this worker has waited too long: who does not say that it waits as well.

        Through the key-value store of TensorFlow's coordination service, which answers while a
        collective hangs. All that wait in the collective ask at about the same time.
        """
        if self.count == 1:
            return ""
        service, prefix = eager.context(), "dist_train/waits"
        silent, elsewhere = [], []
        try:
            service.set_config_key_value(f"{prefix}/{self.index}", what)
            deadline = time.monotonic() + _ANSWER_S
            for other in range(self.count):
                left = max(0.1, deadline - time.monotonic())
                try:
                    theirs = service.get_config_key_value(f"{prefix}/{other}", int(1000 * left))
                except tf.errors.DeadlineExceededError:
                    silent.append(self.name(other))
                    continue
                if theirs != what:
                    elsewhere.append(f"{self.name(other)} waits in {theirs}")
        except tf.errors.OpError as error:
            return f"the chief does not answer ({str(error.message).splitlines()[0]})"
        if silent:
            return f"waiting for {', '.join(silent)}"
        return "; ".join(elsewhere) or "all workers wait, so the network between them is cut"

    def _sum(self, value: tf.Tensor) -> tf.Tensor:
        """The sum of each worker's [n] int32; of its replicas the first speaks for it."""

        def replica(value: tf.Tensor) -> tf.Tensor:
            context = tf.distribute.get_replica_context()
            first = context.replica_id_in_sync_group % self.local_replicas == 0
            part = tf.where(first, value, tf.zeros_like(value))
            return context.all_reduce(tf.distribute.ReduceOp.SUM, part)

        sums = self._strategy.run(replica, args=(value,))
        return self._strategy.experimental_local_results(sums)[0]


def _is_own(error: tf.errors.OpError, message: str) -> bool:
    """Whether an operation of this worker failed by itself, a label out of range say.

    What comes from a peer names the collective that it has ended.
    """
    own = (tf.errors.InvalidArgumentError, tf.errors.UnknownError)
    return isinstance(error, own) and re.search("aborted by|[Cc]ollective", message) is None


def essence(error: tf.errors.OpError) -> str:
    """The line of TensorFlow's message that says what is wrong, out of traces and node names."""
    text = str(error.message).partition("\n\t [[{{")[0]
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith(" ")]
    return lines[-1].strip() if lines else type(error).__name__
