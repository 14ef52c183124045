"""The training step, fused: all that replicas share reduced at once, no Python between two steps.

Each replica computes its part of the global batch's gradients and sums. Where there are several,
`reduction` adds them. What is not linear (the mean, clipping, the optimizer) comes after it, alike
on every replica. So the result does not depend on how the batch was divided.
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dist_train import reduction
from dist_train.agreement import agree, weight_hash
from dist_train.line import SIGNALS, Line, Signals, record, record_size
from dist_train.optimizers import last_rate, update_locally
from dist_train.program import LOSS, WEIGHT, Program

_TIMED_REDUCTIONS = 20
_MOST_LINES = 256  # of a call


class LossScale:
    """Dynamic loss scaling for float16 (Micikevicius et al., 2018, section 3.2).

    Doubled after 2,000 finite steps; halved, and the step left out, when the *reduced* gradient is
    not finite, so that all replicas decide alike. Created in the strategy's scope.
    """

    _GROWTH_STEPS = 2000

    def __init__(self) -> None:
        self.scale = tf.Variable(2.0**15, trainable=False, name="loss_scale")
        self.finite_steps = tf.Variable(0, trainable=False, name="finite_steps")

    @property
    def variables(self) -> dict[str, tf.Variable]:
        return {"scale": self.scale, "finite_steps": self.finite_steps}

    def update(self, finite: tf.Tensor) -> None:
        """After a step, in replica context."""
        grown = self.finite_steps + 1 >= self._GROWTH_STEPS
        factor = tf.where(finite, tf.where(grown, 2.0, 1.0), 0.5)
        self.finite_steps.assign(tf.where(finite & ~grown, self.finite_steps + 1, 0))
        self.scale.assign(tf.maximum(self.scale * factor, 1.0))


class TrainLoop:
    """Many training steps per call, on all replicas.

    A call tells of its steps line by line of the log: a call for each line costs as much as 15 to
    40 steps of a small model.

    Args:
      strategy: of which `program` and `optimizer` were made in the scope.
      program: what to compute.
      optimizer: built for the model's trainable variables.
      log_steps: how many steps a line is about.
      loss_scale: for float16, or None.
      skip_not_finite: whether a step whose loss or gradient is not finite leaves no trace.
      lanes: into how many equal parts, side by side, the one replica splits its batch.
      jit_compile: whether XLA compiles the step; with one replica, the loop as a whole.
    """

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        program: Program,
        optimizer: keras.optimizers.Optimizer,
        *,
        log_steps: int,
        loss_scale: LossScale | None = None,
        skip_not_finite: bool = False,
        lanes: int = 1,
        jit_compile: bool,
    ):
        self._strategy = strategy
        self._program = program
        self._optimizer = optimizer
        self._log_steps = min(log_steps, 1 << 30)  # its sums are int32; no chunk is that long
        self._loss_scale = loss_scale
        self._skip = skip_not_finite
        self._lanes = lanes
        self._replicas = strategy.num_replicas_in_sync
        # For its norm in the end. XLA does that for nothing, and a condition would cost it 2 %;
        # without XLA a buffer more in use costs more than a condition.
        self._carries_gradient = self._replicas == 1 and jit_compile
        self._variables = program.model.trainable_variables
        # Batch statistics move before the loss is known.
        self._statistics = [
            variable
            for variable in program.model.non_trainable_variables
            if skip_not_finite and variable.dtype.startswith(("float", "bfloat"))
        ]
        self._sums = len(program.sum_names)
        self._tail = self._sums + SIGNALS
        shapes = [*(variable.shape for variable in self._variables), [self._tail]]
        self._reduce = reduction.make(strategy, shapes)
        update_locally(optimizer)
        with tf.device("CPU:0"):
            self._stop_requested = tf.Variable(0.0, trainable=False, name="stop_requested")
        if self._replicas == 1:
            # strategy.run of the whole loop: XLA keeps the weights in place from step to step.
            loop = tf.function(
                self._loop(self._replica_step), jit_compile=jit_compile, autograph=False
            )
            self._run = lambda *args: strategy.run(loop, args=args)
            traced = loop
        else:
            # A loop of strategy.run: a collective cannot be inside a program of XLA's, so only
            # the forward and backward pass are.
            if jit_compile:
                self._share = tf.function(  # type: ignore[method-assign]
                    self._share, jit_compile=True, autograph=False
                )
            self._run = traced = tf.function(self._loop(self._distributed_step), autograph=False)
        # TensorFlow counts by the line of the code, and takes one run after another for a mistake.
        traced._omit_frequent_tracing_warning = True

    def __call__(
        self,
        data: Any,
        chunk: Any,
        start: int,
        stop: int,
        next_steps: int = 0,
        *,
        to_line: int | None = None,
    ) -> list[Line]:
        """Runs the steps `start` to `stop` of a chunk; up to the first whose loss is not finite, or
        in which all are to stop.

        All workers must ask for the same steps: TensorFlow matches their collectives by the numbers
        of the line and of the step within the call, so calls of different lengths would wait for
        ever.

        Args:
          data: the resident examples, or ().
          chunk: see `input.Chunk`, one per replica.
          start, stop: steps within the chunk; at most `most_steps`.
          next_steps: how many steps this worker would like the next call to make.
          to_line: after how many steps the first line ends, 1 to `log_steps`; None: the latter.

        Returns:
          What each line is told of; the last one may be about fewer steps.
        """
        first = min(stop, start + (to_line or self._log_steps))
        numbers = map(tf.constant, (start, stop, first, float(next_steps)))
        outputs = self._run(data, chunk, *numbers)
        done, records = (self._first(output).numpy() for output in outputs)
        ends = [*range(first, int(done), self._log_steps), int(done)]
        return [
            Line.of(end - begin, values, self._sums, self._replicas)
            for begin, end, values in zip([start, *ends], ends, records, strict=False)
        ]

    def most_steps(self, to_line: int) -> int:
        """How many steps a call can tell of whose first line ends after `to_line` of them."""
        return to_line + (_MOST_LINES - 1) * self._log_steps

    def request_stop(self) -> None:
        """Ends the loop of *every* worker at the same step; at any time, from any thread."""
        self._stop_requested.assign(1.0)

    def time_reduction(self) -> float:
        """Seconds that a step's reduction takes by itself, the median of some; 0.0 on one replica.

        It does not wait for a slower replica, as a step does. All workers must call it alike.
        """
        if self._replicas == 1:
            return 0.0

        def reduced() -> tf.Tensor:
            # The weights, as TensorFlow would add constants while it compiles.
            weights = [tf.cast(variable.value, tf.float32) for variable in self._variables]
            with tf.control_dependencies(self._reduce([*weights, tf.zeros([self._tail])])):
                return tf.constant(0.0)

        def body(count: tf.Tensor, times: tf.TensorArray) -> tuple:
            with tf.control_dependencies([self._first(self._strategy.run(reduced))]):
                return count + 1, times.write(count, tf.timestamp())

        @tf.function(autograph=False)
        def timestamps() -> tf.Tensor:
            times = tf.TensorArray(tf.float64, _TIMED_REDUCTIONS)
            return tf.while_loop(
                lambda count, _: count < _TIMED_REDUCTIONS,
                body,
                (tf.constant(0), times),
                parallel_iterations=1,
            )[1].stack()

        return float(np.median(np.diff(timestamps().numpy())))

    def _first(self, values: Any) -> tf.Tensor:
        """What the first replica of this process has."""
        return self._strategy.experimental_local_results(values)[0]

    def _loop(self, run_step: Callable[..., tuple]) -> Callable[..., tuple]:
        def loop(
            data: Any,
            chunk: Any,
            start: tf.Tensor,
            stop: tf.Tensor,
            first: tf.Tensor,
            next_steps: tf.Tensor,
        ) -> tuple:
            def healthy(tail: tf.Tensor) -> tf.Tensor:
                signals = Signals.of(tail)
                agreed = agree(self._replicas, signals.hashes, signals.squares)
                return tf.math.is_finite(tail[LOSS]) & (signals.stops == 0.0) & agreed

            def line(step: tf.Tensor, tail: tf.Tensor, number: tf.Tensor, records: Any) -> tuple:
                end = tf.minimum(first + number * self._log_steps, stop)

                def body(step: tf.Tensor, sums: tf.Tensor, tail: tf.Tensor, last: Any) -> tuple:
                    del tail, last
                    tail, last = run_step(data, chunk, step, next_steps, step + 1 == end)
                    added = tf.where(tf.math.is_finite(tail[LOSS]), tail[: self._sums], 0.0)
                    return step + 1, sums + added, tail, last

                carried = self._variables if self._carries_gradient else ()
                last = [tf.zeros(variable.shape) for variable in carried] or [tf.zeros([])]
                step, sums, tail, last = tf.while_loop(
                    lambda step, sums, tail, last: (step < end) & healthy(tail),
                    body,
                    (step, tf.zeros([self._sums]), tail, [last] * self._lanes),
                    parallel_iterations=1,
                )
                # Of the gradient, or of its norm alone, which is its own norm.
                norm = tf.linalg.global_norm(_added(last)) / tail[WEIGHT]
                values = record(sums, tail, norm, last_rate(self._optimizer))
                return step, tail, number + 1, records.write(number, values)

            records = tf.TensorArray(
                tf.float32, _MOST_LINES, element_shape=[record_size(self._sums)]
            )
            done, _, _, records = tf.while_loop(
                lambda step, tail, number, records: (step < stop) & healthy(tail),
                line,
                (start, tf.zeros([self._tail]), 0, records),
                parallel_iterations=1,
            )
            return done, records.stack()

        return loop

    def _distributed_step(self, *args: Any) -> tuple:
        outputs = self._strategy.run(self._replica_step, args=args)
        return tf.nest.map_structure(self._first, outputs)

    def _replica_step(
        self, data: Any, chunk: Any, step: tf.Tensor, next_steps: tf.Tensor, is_last: tf.Tensor
    ) -> tuple[tf.Tensor, list[list[tf.Tensor]]]:
        """One step in replica context.

        Returns:
          The reduced sums and signals; for each lane, tensors that added up have the global norm of
          the reduced gradient, if the step is the last of a line.
        """
        # Out here: XLA would copy all resident examples at each call of what it compiles per step.
        lanes = [chunk.batch(step, data, lane, self._lanes) for lane in range(self._lanes)]
        statistics = [tf.identity(variable.value) for variable in self._statistics]
        if self._replicas == 1:
            found = [self._gradients(examples, ids, chunk.epoch) for examples, ids in lanes]
            shares = [gradients for gradients, _ in found]
            sums = tf.add_n([of_lane for _, of_lane in found])
            tail = tf.concat([sums, tf.stack(Signals(next_steps))], 0)
        else:
            replica = tf.distribute.get_replica_context()
            proposal = tf.where(replica.replica_id_in_sync_group == 0, next_steps, 0.0)
            stop = self._stop_requested.read_value()
            [(examples, ids)] = lanes
            gradients, tail = self._share(examples, ids, chunk.epoch, proposal, stop)
            *gradients, tail = self._reduce([*gradients, tail])
            shares = [gradients]
        if self._loss_scale is not None:
            scale = self._loss_scale.scale
            shares = [[gradient / scale for gradient in gradients] for gradients in shares]
        gradients = _added(shares)
        finite = self._apply(gradients, tail)
        # Of each lane: XLA adds them where they are used, and need not keep the sums.
        last = shares
        if not self._carries_gradient:  # a norm in each step costs a small one 2 to 5 %
            last = [[tf.cond(is_last, lambda: tf.linalg.global_norm(gradients), lambda: 0.0)]]
        if not self._skip:
            return tail, last
        for variable, before in zip(self._statistics, statistics, strict=True):
            variable.assign(tf.where(finite, variable.value, before))
        if self._loss_scale is None:  # otherwise an overflow of the gradient alone is usual
            is_loss = np.arange(self._tail) == LOSS
            tail = tf.where(finite | ~is_loss, tail, float("nan"))
        return tail, last

    def _share(
        self,
        examples: Any,
        ids: tf.Tensor,
        epoch: tf.Tensor,
        proposal: tf.Tensor,
        stop: tf.Tensor,
    ) -> tuple[list[tf.Tensor], tf.Tensor]:
        """All that this replica gives to the sum: its gradients; its sums and signals."""
        hashed = weight_hash(self._variables, self._replicas)
        signals = tf.stack(Signals(proposal, stop, hashed, hashed * hashed))
        gradients, sums = self._gradients(examples, ids, epoch)
        return gradients, tf.concat([sums, signals], 0)

    def _gradients(
        self, examples: Any, ids: tf.Tensor, epoch: tf.Tensor
    ) -> tuple[list[tf.Tensor], tf.Tensor]:
        """This replica's gradients, float32 in the shapes of the weights, and sums, [sums]."""
        parts = self._program.parts
        if parts == 1:
            return self._part(examples, ids, epoch)
        size = -(-ids.shape[0] // parts)
        padding = [[0, size * parts - ids.shape[0]]]
        rows = tf.reshape(tf.pad(tf.range(ids.shape[0]), padding), [parts, size])
        ids = tf.reshape(tf.pad(ids, padding, constant_values=-1), [parts, size])

        def add(part: tf.Tensor, total: tuple) -> tuple:
            some = tf.nest.map_structure(lambda array: tf.gather(array, rows[part]), examples)
            more = self._part(some, ids[part], epoch)
            return part + 1, tf.nest.map_structure(tf.add, total, more)

        zeros = [tf.zeros(variable.shape) for variable in self._variables]
        return tf.while_loop(
            lambda part, _: part < parts,
            add,
            (0, (zeros, tf.zeros([self._sums]))),
            parallel_iterations=1,
        )[1]

    def _part(
        self, examples: Any, ids: tf.Tensor, epoch: tf.Tensor
    ) -> tuple[list[tf.Tensor], tf.Tensor]:
        scale = None if self._loss_scale is None else self._loss_scale.scale
        return self._program.gradients(examples, ids, epoch, scale=scale)

    def _apply(self, gradients: list[tf.Tensor], tail: tf.Tensor) -> tf.Tensor | None:
        """The optimizer's update of this replica's weights, from the reduced gradients.

        Returns:
          [] bool, whether all was finite and the update was made; None: it was not looked at.
        """
        means = [
            tf.cast(gradient / tail[WEIGHT], variable.dtype)
            for gradient, variable in zip(gradients, self._variables, strict=True)
        ]
        if self._loss_scale is None and not self._skip:
            self._optimizer.apply(means, self._variables)
            return None
        finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(g)) for g in gradients])
        if self._skip:
            finite &= tf.math.is_finite(tail[LOSS])
        tf.cond(
            finite,
            lambda: self._optimizer.apply(means, self._variables),
            lambda: None,
        )
        if self._loss_scale is not None:
            self._loss_scale.update(finite)
        return finite


def _added(lanes: Sequence[Sequence[tf.Tensor]]) -> list[tf.Tensor]:
    """Sums over the lanes."""
    return [tf.add_n(tensors) for tensors in zip(*lanes, strict=True)]
