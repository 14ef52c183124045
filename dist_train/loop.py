"""The loop: a whole run, from the task to the exported model."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from dist_train import curves, export, layers, metrics, optimizers, start, watchdog
from dist_train import task as tasks
from dist_train.checkpoint import Checkpoints, broadcast, gather
from dist_train.cluster import Cluster
from dist_train.config import Config
from dist_train.errors import RunError, Stopped, UsageError
from dist_train.examples import Source, digest
from dist_train.input import Input, choose
from dist_train.step import (
    LossScale,
    Program,
    Progress,
    TrainLoop,
    example_loss,
    make_evaluation,
)
from dist_train.stopping import StopRequest
from dist_train.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run ended with.

    Attributes:
      metrics: {"train" | "validation" | "test": {"loss": …, "accuracy": …}}, exact means; train is
        over the last logged steps.
      model: the trained model; with --ema, its averaged weights are in the exports, not here.
      step: how many steps were done in all.
      workdir: the folder, as a string; on workers other than the chief, None.
    """

    metrics: dict[str, dict[str, float]]
    model: keras.Model
    step: int
    workdir: str | None


def run(
    task: "tasks.Task | Callable[..., tasks.Task] | None",
    config: Config,
    strategy: tf.distribute.Strategy,
    cluster: Cluster | None,
    workdir: Workdir | None,
    request: StopRequest,
) -> Result:
    """Trains or evaluates with a strategy that is up; see `start.train`."""
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(config.dtype)
    if config.determinism:
        tf.config.experimental.enable_op_determinism()
    try:
        resolved = tasks.load(config.task, config) if task is None else tasks.resolve(task, config)
        trainer = _Trainer(resolved, config, strategy, cluster, workdir, request)
        return trainer.evaluate() if config.mode == "evaluate" else trainer.train()
    finally:
        keras.config.set_dtype_policy(policy)


class _Trainer:
    """The parts of one run, made in their order, and what it does with them."""

    def __init__(
        self,
        task: tasks.Task,
        config: Config,
        strategy: tf.distribute.Strategy,
        cluster: Cluster | None,
        workdir: Workdir | None,
        request: StopRequest,
    ):
        self._task = task
        self._config = config
        self._strategy = strategy
        self._cluster = cluster if cluster is not None and len(cluster.addresses) > 1 else None
        self._workdir = workdir
        self._request = request
        self._eval_inputs: dict[str, Input] = {}
        self._check_same_data()

        sources = [s for s in (task.train, task.validation, task.test) if s is not None]
        local_replicas = strategy.num_replicas_in_sync // self._workers
        self._resident, self._input_reason = choose(config.input, sources, local_replicas)
        self._train_input = self._input(task.train, seed=config.seed, shuffle=config.shuffle)
        self._schedule = self._train_input.schedule
        self._total_steps = config.epochs * self._schedule.steps_per_epoch
        self._build()

    # Making the parts.

    @property
    def _workers(self) -> int:
        return 1 if self._cluster is None else len(self._cluster.addresses)

    @property
    def _is_chief(self) -> bool:
        return self._cluster is None or self._cluster.is_chief

    def _input(self, source: Source, **options: Any) -> Input:
        return Input(
            source,
            self._strategy,
            resident=self._resident,
            batch_size=self._config.batch_size,
            **options,
        )

    def _check_same_data(self) -> None:
        """All workers hold the same examples; also the first thing that they do together."""
        if self._cluster is None:
            return
        for name in ("train", "validation", "test"):
            source = getattr(self._task, name)
            mine = 0 if source is None else digest(source)
            with self._together("the comparison of the data"):
                digests = gather(self._strategy, mine, self._cluster.index, self._workers)
            for worker, theirs in enumerate(digests):
                if theirs != digests[0]:
                    raise UsageError(
                        f"{self._cluster.name(worker)} has other {name} examples (digest"
                        f" {theirs:08x}) than the chief ({digests[0]:08x}); give all workers the"
                        " same data"
                    )

    def _build(self) -> None:
        config, task, strategy = self._config, self._task, self._strategy
        replicas = strategy.num_replicas_in_sync
        keras.utils.set_random_seed(config.seed)
        with strategy.scope():
            self._model = task.model()
            if not self._model.built:
                raise UsageError(
                    "the model has no input shape yet; start it with keras.Input or build it"
                )
            self._optimizer = self._make_optimizer()
            self._optimizer.build(self._model.trainable_variables)
            loss_scale = LossScale() if config.dtype == "mixed_float16" else None
        layers.check_batch_statistics(
            self._model,
            batch_size=config.batch_size,
            examples=len(task.train),
            replicas=replicas,
        )
        gpu = bool(tf.config.get_visible_devices("GPU"))
        x, y = task.train[np.zeros(1, np.int64)]
        strings = any(np.asarray(a).dtype.kind in "SUO" for a in tf.nest.flatten((x, y)))
        self._jit, self._jit_reason = layers.choose_jit(
            config.jit_compile, self._model, gpu=gpu, replicas=replicas, strings=strings
        )
        self._program = Program(
            model=self._model,
            loss=example_loss(task.loss),
            metrics=task.metrics,
            preprocess=task.preprocess,
            seed=config.seed,
            parts=config.gradient_accumulation,
        )
        self._loop = TrainLoop(
            strategy, self._program, self._optimizer, loss_scale=loss_scale, jit_compile=self._jit
        )
        self._evaluation = make_evaluation(strategy, self._program)
        # The sums since the last line of the log are state too: a resumed run logs the same means.
        with tf.device("CPU:0"):
            self._pending = tf.Variable(
                np.zeros(len(self._program.sum_names)), trainable=False, name="pending"
            )
        seeds = layers.random_states(self._model)
        scale = {} if loss_scale is None else loss_scale.variables
        self._state = [
            *self._model.variables, *self._optimizer.variables, *scale.values(), self._pending
        ]  # fmt: skip
        if self._workdir is not None:
            state = tf.train.Checkpoint(
                model=self._model, optimizer=self._optimizer, pending=self._pending,
                **{f"seed_{number}": seed for number, seed in enumerate(seeds)},
                **scale,
            )  # fmt: skip
            self._checkpoints = Checkpoints(
                self._workdir.checkpoints, state, keep=config.keep_checkpoints
            )

    def _make_optimizer(self) -> keras.optimizers.Optimizer:
        config = self._config
        if self._task.optimizer is not None:
            return self._task.optimizer()
        return optimizers.make(
            config.optimizer,
            learning_rate=config.learning_rate,
            lr_schedule=config.lr_schedule,
            warmup_steps=config.warmup_steps,
            total_steps=self._total_steps,
            weight_decay=config.weight_decay,
            clip_norm=config.clip_norm,
            ema=config.ema,
        )

    def _restore(self) -> int:
        """The state of the newest checkpoint, or the initial one, on every worker; its step."""
        step = np.int64(0)
        if self._is_chief:
            restored = self._checkpoints.restore()
            if restored is None and self._config.initial_weights is not None:
                _load_weights(self._model, self._config.initial_weights)
            step = np.int64(restored or 0)
        if self._cluster is not None:
            carrier = tf.Variable(step, trainable=False)
            with self._together("the broadcast of the state"):
                broadcast(self._strategy, [*self._state, carrier])
            step = carrier.numpy()
        layers.separate_randomness(self._strategy, self._model)
        return int(step)

    # What a run does.

    def evaluate(self) -> Result:
        """The newest checkpoint of the workdir, on the validation and test examples."""
        step = self._restore()
        if step == 0 and self._is_chief and not self._checkpoints.steps():
            raise UsageError(f"workdir={self._config.workdir} has no checkpoint to evaluate")
        results = {}
        for kind in ("validation", "test"):
            values = self._evaluate(kind)
            if values is not None:
                results[kind] = values
                shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
                logging.log(self._level, "step %d  %s: %s", step, kind, shown)
        self._leave()
        return self._result(results, step)

    def train(self) -> Result:
        """From the newest checkpoint, or from the beginning, to the exported model."""
        step = self._restore()
        self._announce(step)
        results: dict[str, dict[str, float]] = {}
        with self._log(step) as (log, file):
            step = self._fit(step, log, file, results)
            values = self._evaluate("test")
            if values is not None:
                results["test"] = values
                log.evaluation("test", self._row(step) | values)
        self._export()
        self._leave()
        return self._result(results, step)

    def _fit(
        self,
        step: int,
        log: metrics.RunLog,
        file: "metrics.MetricsFile | None",
        results: dict[str, dict[str, float]],
    ) -> int:
        """All steps from `step` to the last; returns it."""
        pace = _Pace(self._config.steps_per_loop)
        timer = _Timer()
        saved = time.monotonic()
        chunks: Iterator | None = None
        chunk, current = None, -1
        self._request.watch_from(lambda: self._loop.stop_requested.assign(1.0))
        while step < self._total_steps:
            number, begin, left = self._schedule.locate(step)
            if number != current:
                if chunks is None:
                    chunks = self._train_input.chunks(number)
                chunk, current = next(chunks), number
            limit = min(left, self._steps_to_boundary(step), pace.steps)
            with self._together(f"step {step + 1} to {step + limit}"), pace.timing(), timer:
                progress = self._loop(self._train_input.data, chunk, begin, begin + limit)
            step += progress.steps
            pace.done(progress.steps)
            self._check(step, progress)
            log.advance(progress.steps)
            self._pending.assign_add(progress.sums)

            if step % self._config.log_steps == 0 or step == self._total_steps:
                results["train"] = self._log_train(step, progress, timer, log)
            epoch, within = divmod(step, self._schedule.steps_per_epoch)
            every = self._config.eval_epochs
            if within == 0 and every and epoch % every == 0:
                values = self._evaluate("validation")
                if values is not None:
                    results["validation"] = values
                    log.evaluation("validation", self._row(step) | values)
            stop = progress.stop or (self._cluster is None and self._request.signal is not None)
            stop = stop and step < self._total_steps
            if stop or self._checkpoint_due(step, within, time.monotonic() - saved):
                self._save(step, file)
                saved = time.monotonic()
            if stop:
                self._leave()
                raise Stopped(self._stop_message(step))
        return step

    def _log_train(
        self, step: int, progress: Progress, timer: "_Timer", log: metrics.RunLog
    ) -> dict[str, float]:
        names = self._program.sum_names
        values = metrics.means(names, self._pending.numpy())
        last = metrics.means(names, progress.last)
        seconds = timer.restart()
        rate = float(self._pending.numpy()[names.index("weight")]) / max(seconds, 1e-9)
        log.train(
            self._row(step) | {"batch_loss": last["loss"], **values, "examples_per_second": rate}
        )
        self._pending.assign(np.zeros(len(names)))
        return values

    def _evaluate(self, kind: str) -> dict[str, float] | None:
        """The exact means over all examples of `kind`, or None if the task has none."""
        source = getattr(self._task, kind)
        if source is None:
            return None
        inputs = self._eval_inputs.get(kind)
        if inputs is None:
            inputs = self._eval_inputs[kind] = self._input(source)
        schedule = inputs.schedule
        total = np.zeros(len(self._program.sum_names))
        chunks = inputs.chunks(0)
        with (
            self._together(f"the {kind}"),
            optimizers.averaged_weights(self._strategy, self._model, self._optimizer),
        ):
            step = 0
            while step < schedule.steps_per_epoch:
                _, _, steps = schedule.locate(step)
                total += self._evaluation(inputs.data, next(chunks), steps)
                step += steps
        return metrics.means(self._program.sum_names, total)

    # What happens on the way.

    def _steps_to_boundary(self, step: int) -> int:
        """Steps until something must be done between two steps."""
        periods = [self._config.log_steps, self._schedule.steps_per_epoch]
        if self._config.checkpoint_steps is not None:
            periods.append(self._config.checkpoint_steps)
        distances = [period - step % period for period in periods]
        return min(*distances, self._total_steps - step)

    def _checkpoint_due(self, step: int, within_epoch: int, seconds: float) -> bool:
        config = self._config
        if config.checkpoint_secs is not None and seconds >= config.checkpoint_secs:
            return True
        if config.checkpoint_steps is not None:
            return step % config.checkpoint_steps == 0 or step == self._total_steps
        return within_epoch == 0

    def _check(self, step: int, progress: Progress) -> None:
        """Raises RunError if the last step has shown that going on is useless."""
        if progress.diverged:
            raise RunError(
                f"the replicas' weights differ since step {step - 1}, which must not happen; start"
                " again from the last checkpoint"
            )
        loss = progress.last[0]
        if not np.isfinite(loss):
            raise RunError(
                f"the loss of step {step} is {loss}; the last checkpoint is kept. Try a smaller"
                " --learning_rate, or --clip_norm"
            )

    def _save(self, step: int, file: "metrics.MetricsFile | None") -> None:
        if self._workdir is None:
            return
        for variable in self._model.trainable_variables:
            if not np.all(np.isfinite(variable.numpy().astype(np.float32))):
                raise RunError(
                    f"{variable.path} is not finite after step {step}; the last checkpoint is kept."
                    " Try a smaller --learning_rate, or --clip_norm"
                )
        if file is not None:
            file.sync()
        self._checkpoints.save(step)

    def _export(self) -> None:
        if self._workdir is None:
            return
        with optimizers.averaged_weights(self._strategy, self._model, self._optimizer):
            export.write(self._model, self._workdir.model, self._workdir.saved_model)
        names = [name for name in self._program.sum_names if name not in ("loss", "weight")]
        curves.draw(metrics.read_rows(self._workdir.metrics), names, self._workdir.curves)
        logging.info(
            "done: %s holds model.keras, saved_model/, curves.png, metrics.jsonl, checkpoints/ and"
            " tensorboard/",
            self._workdir.path,
        )

    def _leave(self) -> None:
        """Workers leave together: one that exits early makes TensorFlow fail the others."""
        if self._cluster is not None:
            with self._together("the end"):
                gather(self._strategy, 0, self._cluster.index, self._workers)

    @contextlib.contextmanager
    def _together(self, what: str) -> Iterator[None]:
        """Bounds a body in which the replicas wait for one another, and names what failed."""
        limit = self._config.stall_timeout_s
        message = f"{what} took longer than {{seconds}}; raise --stall_timeout_s if that is right"
        try:
            with watchdog.bound(limit, message):
                yield
        except tf.errors.ResourceExhaustedError as error:
            raise RunError(
                f"out of memory at {what}; use a smaller --batch_size, --gradient_accumulation or"
                " --input=stream"
            ) from error
        except tf.errors.OpError as error:
            if self._cluster is None:
                raise
            first = " ".join(str(error.message).split())[:300]
            raise RunError(f"a worker was lost at {what}: {first}") from error

    # What is said.

    @property
    def _level(self) -> int:
        return logging.INFO if self._is_chief else logging.DEBUG

    @contextlib.contextmanager
    def _log(self, step: int) -> Iterator[tuple[metrics.RunLog, "metrics.MetricsFile | None"]]:
        if self._workdir is None:
            yield metrics.RunLog([], None), None
            return
        self._workdir.write_config(dataclasses.asdict(self._config), start.versions())
        with metrics.chief_log(
            self._workdir.metrics,
            self._workdir.tensorboard,
            step=step,
            total_steps=self._total_steps,
            progress=self._config.progress,
        ) as opened:
            yield opened

    def _row(self, step: int) -> metrics.Row:
        epoch = -(-step // self._schedule.steps_per_epoch)
        return {"step": step, "epoch": epoch, "examples": self._schedule.examples_until(step)}

    def _announce(self, step: int) -> None:
        """The block at the start: versions, replicas, batch arithmetic."""
        if self._workdir is None:
            return
        config, replicas = self._config, self._strategy.num_replicas_in_sync
        numbers = start.versions()
        kind = "GPU" if tf.config.get_visible_devices("GPU") else "CPU"
        share = -(-config.batch_size // replicas)
        weights = sum(int(np.prod(v.shape)) for v in self._model.trainable_variables)
        padded = "" if share * replicas == config.batch_size else ", the last one padded"
        logging.info(
            "dist_train %s, TensorFlow %s, Keras %s, Python %s\n"
            "strategy %s: %d worker%s, %d replica%s on %s\n"
            "batch %d = %d per replica%s; %s examples = %s steps per epoch, %s in all\n"
            "model %s: %s weights; %s, %s\n"
            "input %s (%s); XLA %s (%s)\n"
            "workdir %s%s",
            numbers.get("dist_train", "(not installed)"), numbers["tensorflow"], numbers["keras"],
            numbers["python"],
            config.strategy, self._workers, _s(self._workers), replicas, _s(replicas), kind,
            config.batch_size, share, padded, f"{self._schedule.examples:,}",
            f"{self._schedule.steps_per_epoch:,}", f"{self._total_steps:,}",
            self._model.name, f"{weights:,}", self._optimizer.name, config.dtype,
            "resident" if self._resident else "stream", self._input_reason,
            "on" if self._jit else "off", self._jit_reason,
            self._workdir.path, f", resumed at step {step:,}" if step else "",
        )  # fmt: skip

    def _stop_message(self, step: int) -> str:
        signal = self._request.signal
        by = signal.name if signal is not None else "a signal to another worker"
        if self._workdir is None:
            return f"by {by} after step {step}"
        return (
            f"by {by} after step {step}, saved; --workdir={self._workdir.path} goes on from there"
        )

    def _result(self, results: dict[str, dict[str, float]], step: int) -> Result:
        path = None if self._workdir is None else str(self._workdir.path)
        return Result(metrics=results, model=self._model, step=step, workdir=path)


class _Pace:
    """How many steps the next call of the loop makes: about a second's worth.

    A call cannot be interrupted by one process alone, and a bar must move; but each call costs a
    millisecond. The numbers do not depend on it.
    """

    _TARGET_S = 1.0
    _FIRST = 16

    def __init__(self, fixed: int | None):
        self._fixed = fixed
        self.steps = fixed or self._FIRST
        self._calls = 0
        self._seconds = 0.0

    @contextlib.contextmanager
    def timing(self) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self._seconds = time.perf_counter() - begin

    def done(self, steps: int) -> None:
        """After a call of so many steps."""
        self._calls += 1
        if self._fixed is None and self._calls > 1:  # the first call traces and compiles
            self.steps = max(1, int(self._TARGET_S * steps / max(self._seconds, 1e-6)))


class _Timer:
    """The time spent in training steps since the last line of the log."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._begin = 0.0

    def __enter__(self) -> None:
        self._begin = time.perf_counter()

    def __exit__(self, *exc: object) -> None:
        self._seconds += time.perf_counter() - self._begin

    def restart(self) -> float:
        """The seconds so far; begins anew."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def _s(count: int) -> str:
    return "" if count == 1 else "s"


def _load_weights(model: keras.Model, path: str) -> None:
    try:
        if path.endswith(".keras"):
            model.set_weights(keras.saving.load_model(path, compile=False).get_weights())
        else:
            model.load_weights(path)
    except (OSError, ValueError, KeyError) as error:
        text = " ".join(str(error).split())[:300]
        raise UsageError(f"initial_weights={path} cannot be used: {text}") from error
