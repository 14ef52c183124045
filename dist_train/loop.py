"""The loop: a whole run, from the task to the exported model."""

import contextlib
import dataclasses
import json
import os
import time
import zlib
from collections.abc import Callable, Iterator

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from dist_train import curves, export, layers, metrics, optimizers, versions, watchdog
from dist_train import task as tasks
from dist_train.build import Parts, load_weights
from dist_train.checkpoint import Checkpoints
from dist_train.cluster import Cluster
from dist_train.config import Config
from dist_train.errors import RunError, Stopped, UsageError
from dist_train.examples import digest
from dist_train.heartbeat import Heartbeat
from dist_train.pace import Pace
from dist_train.profiling import Profile
from dist_train.step import Progress
from dist_train.stopping import StopRequest
from dist_train.timetable import Timetable
from dist_train.workdir import Workdir
from dist_train.workers import Workers

Means = dict[str, float]
_POLL_S = 0.5


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run ended with.

    Attributes:
      metrics: {"train" | "validation" | "test": {"loss": …, "accuracy": …}}, exact means; train is
        over the steps of the last line of the log.
      model: the trained model; where --ema is set, its averaged weights are in the exports.
      step: how many steps were done in all.
      workdir: the folder; None on workers other than the chief.
    """

    metrics: dict[str, Means]
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
    """Trains or evaluates with a strategy that is up; see `start.train`.

    Args:
      workdir: None on workers other than the chief.
    """
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(config.dtype)
    if config.determinism:
        tf.config.experimental.enable_op_determinism()
    try:
        resolved = tasks.load(config.task, config) if task is None else tasks.resolve(task, config)
        loop = _Loop(resolved, config, strategy, Workers(strategy, cluster), workdir, request)
        modes = {"train": loop.train, "evaluate": loop.evaluate, "follow": loop.follow}
        return modes[config.mode]()
    finally:
        keras.config.set_dtype_policy(policy)


class _Loop:
    def __init__(
        self,
        task: tasks.Task,
        config: Config,
        strategy: tf.distribute.Strategy,
        workers: Workers,
        workdir: Workdir | None,
        request: StopRequest,
    ):
        self._config = config
        self._strategy = strategy
        self._workers = workers
        self._workdir = workdir
        self._request = request
        self._heartbeat = Heartbeat(os.environ)
        self._check_same_data(task)
        self._parts = Parts(
            task,
            config,
            strategy,
            local_replicas=strategy.num_replicas_in_sync // workers.count,
        )
        self._checkpoints: Checkpoints | None = None
        if workdir is not None:
            self._checkpoints = Checkpoints(
                workdir.checkpoints, self._parts.checkpoint(), keep=config.keep_checkpoints
            )

    def train(self) -> Result:
        """From the newest checkpoint, or from the beginning, to the exported model."""
        step = self._restore()
        with self._log(step) as log:
            results = self._fit(step, log)
            step = self._parts.total_steps
            if (test := self._evaluate("test")) is not None:
                results["test"] = test
                log.evaluation("test", self._row(step) | test)
        self._export()
        self._leave()
        return self._result(results, step)

    def evaluate(self) -> Result:
        """The newest checkpoint, on the validation and test examples."""
        step = self._restore()
        results = {}
        for kind in ("validation", "test"):
            if (values := self._evaluate(kind)) is not None:
                results[kind] = values
                shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
                level = logging.INFO if self._workers.is_chief else logging.DEBUG
                logging.log(level, "step %s  %s: %s", f"{step:,}", kind, shown)
        self._leave()
        return self._result(results, step)

    def follow(self) -> Result:
        """Each checkpoint on the validation examples, as the run that trains writes it."""
        assert self._checkpoints is not None
        assert self._workdir is not None
        self._request.watch_from(lambda: None)
        results: dict[str, Means] = {}
        step, newest_at = -1, time.monotonic()
        self._workdir.path.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(
            metrics.MetricsFile(self._workdir.followed, resumed_step=-1)
        ) as file:
            log = metrics.RunLog(file=file, console=metrics.Console())
            while step < self._parts.total_steps:
                if self._request.signal is not None:
                    raise Stopped(f"by {self._request.signal.name}; evaluated up to step {step:,}")
                if time.monotonic() - newest_at > self._config.stall_timeout_s:
                    raise RunError(
                        f"no checkpoint after step {step:,} in {self._workdir.checkpoints} for"
                        f" {self._config.stall_timeout_s:g} s; raise --stall_timeout_s if that is"
                        " right"
                    )
                newest = max(self._checkpoints.steps(), default=-1)
                if newest <= step or (restored := self._checkpoints.restore()) is None:
                    time.sleep(_POLL_S)
                    continue
                step, newest_at = max(step, newest), time.monotonic()
                if (values := self._evaluate("validation")) is not None:
                    results["validation"] = values
                    log.evaluation("validation", self._row(restored) | values)
        return self._result(results, step)

    def _fit(self, step: int, log: metrics.RunLog) -> dict[str, Means]:
        """All steps from `step` to the last; the last means of each kind."""
        config, parts = self._config, self._parts
        train = parts.inputs["train"]
        times = Timetable(
            steps_per_epoch=train.schedule.steps_per_epoch,
            total_steps=parts.total_steps,
            log_steps=config.log_steps,
            eval_epochs=config.eval_epochs,
            checkpoint_steps=config.checkpoint_steps,
            checkpoint_secs=config.checkpoint_secs,
        )
        pace = Pace(config.steps_per_loop)
        call_steps = pace.wish
        self._pending = parts.pending.numpy()
        folder = None if self._workdir is None else self._workdir.tensorboard
        profile = Profile(config.profile_range, folder)
        results: dict[str, Means] = {}
        chunks, current = None, -1
        saved = time.monotonic()
        self._request.watch_from(parts.train_loop.request_stop)
        while step < parts.total_steps:
            number, begin, left = train.schedule.locate(step)
            if number != current:
                chunks = chunks or train.chunks(number)
                chunk, current = next(chunks), number
            profile.reach(step)
            count = min(left, times.steps_to_next(step), call_steps, profile.steps_to_next(step))
            with self._together(f"steps {step + 1} to {step + count}"), pace.call():
                progress = parts.train_loop(train.data, chunk, begin, begin + count, pace.wish)
            pace.done(progress.steps)
            call_steps = progress.next_steps
            step += progress.steps
            self._check(step, progress)
            log.advance(progress.steps)
            self._heartbeat.beat(step)
            self._pending += progress.sums

            if times.logs(step):
                results["train"] = self._log_train(step, progress, pace.take_seconds(), log)
            if times.validates(step) and (values := self._evaluate("validation")) is not None:
                results["validation"] = values
                log.evaluation("validation", self._row(step) | values)
            stop = self._must_stop(progress) and step < parts.total_steps
            if stop or times.saves(step, time.monotonic() - saved):
                log.sync()
                self._save(step)
                saved = time.monotonic()
            if stop:
                self._leave()
                raise Stopped(self._stop_message(step))
        profile.close()
        return results

    def _evaluate(self, kind: str) -> Means | None:
        """The exact means over all examples of `kind`, or None if the task has none."""
        inputs = self._parts.inputs.get(kind)
        if inputs is None:
            return None
        names = self._parts.program.sum_names
        total = np.zeros(len(names))
        with (
            self._together(f"the {kind}"),
            optimizers.averaged_weights(self._strategy, self._parts.model, self._parts.optimizer),
        ):
            for chunk, steps in inputs.first_epoch():
                total += self._parts.evaluation(inputs.data, chunk, steps)
                self._heartbeat.beat()
        return metrics.means(names, total)

    # State.

    def _restore(self) -> int:
        """The state of the newest checkpoint, or the initial one, on every worker; its step."""
        step = np.int64(0)
        if self._checkpoints is not None:
            restored = self._checkpoints.restore()
            if restored is None and self._config.mode == "evaluate":
                raise UsageError(f"workdir={self._config.workdir} has no checkpoint to evaluate")
            if restored is None and self._config.initial_weights is not None:
                load_weights(self._parts.model, self._config.initial_weights)
            step = np.int64(restored or 0)
        carrier = tf.Variable(step, trainable=False)
        with self._together("the broadcast of the state"):
            self._workers.broadcast([*self._parts.variables, carrier])
        layers.separate_randomness(self._strategy, self._parts.model)
        return int(carrier.numpy())

    def _save(self, step: int) -> None:
        if self._checkpoints is None:
            return
        for variable in self._parts.model.trainable_variables:
            if not np.all(np.isfinite(variable.numpy().astype(np.float32))):
                raise RunError(
                    f"{variable.path} is not finite after step {step}; the last checkpoint is kept."
                    " Try a smaller --learning_rate, or --clip_norm"
                )
        self._parts.pending.assign(self._pending)
        self._checkpoints.save(step)

    def _export(self) -> None:
        if self._workdir is None:
            return
        model, workdir = self._parts.model, self._workdir
        with optimizers.averaged_weights(self._strategy, model, self._parts.optimizer):
            export.write(model, workdir.model, workdir.saved_model)
        names = [n for n in self._parts.program.sum_names if n not in ("loss", "weight")]
        curves.draw(metrics.read_rows(workdir.metrics), names, workdir.curves)
        logging.info(
            "done: %s holds model.keras, saved_model/, curves.png, metrics.jsonl, checkpoints/,"
            " tensorboard/",
            workdir.path,
        )

    # Workers that agree, and what is wrong when they do not.

    def _check_same_data(self, task: tasks.Task) -> None:
        """Settings again: a second run in a process does without the rendezvous."""
        if self._workers.count == 1:
            return
        settings = json.dumps(self._config.shared(), sort_keys=True)
        mine = {"settings": zlib.crc32(settings.encode())}
        for kind in ("train", "validation", "test"):
            source = getattr(task, kind)
            mine[f"{kind} examples"] = 0 if source is None else digest(source)
        with self._together("the comparison of the data"):
            self._workers.check_alike(mine)

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

    def _must_stop(self, progress: Progress) -> bool:
        # With several workers only what came through the collective counts: all see it at once.
        return progress.stop or (self._workers.count == 1 and self._request.signal is not None)

    def _leave(self) -> None:
        """Workers leave together: one that exits early makes TensorFlow fail the others."""
        with self._together("the end"):
            self._workers.barrier()

    @contextlib.contextmanager
    def _together(self, what: str) -> Iterator[None]:
        """Bounds a body in which the replicas wait for one another, and names what failed."""
        message = f"{what}: more than {{seconds}}; raise --stall_timeout_s if that is right"
        try:
            with watchdog.bound(self._config.stall_timeout_s, message):
                yield
        except tf.errors.ResourceExhaustedError as error:
            raise RunError(
                f"{what}: out of memory; use a smaller --batch_size, --gradient_accumulation or"
                " --input=stream"
            ) from error
        except tf.errors.OpError as error:
            if self._workers.count == 1:
                raise
            first = " ".join(str(error.message).split())[:300]
            raise RunError(f"{what}: a worker was lost: {first}") from error

    # What is said.

    @contextlib.contextmanager
    def _log(self, step: int) -> Iterator[metrics.RunLog]:
        """The chief's log, after a block that says what is about to run; the others' is silent."""
        if self._workdir is None:
            yield metrics.RunLog()
            return
        config, count, numbers = self._config, self._workers.count, versions.installed()
        self._workdir.write_config(dataclasses.asdict(config), numbers)
        logging.info(
            "%s\nstrategy %s, %d worker%s\n%s\nworkdir %s%s",
            "  ".join(f"{name} {number}" for name, number in numbers.items()),
            config.strategy,
            count,
            "" if count == 1 else "s",
            "\n".join(self._parts.describe()),
            self._workdir.path,
            f", resumed after step {step:,}" if step else "",
        )
        with metrics.RunLog.opened(
            self._workdir.metrics,
            self._workdir.tensorboard,
            step=step,
            total_steps=self._parts.total_steps,
            progress=config.progress,
        ) as log:
            yield log

    def _log_train(
        self, step: int, progress: Progress, seconds: float, log: metrics.RunLog
    ) -> Means:
        names, sums = self._parts.program.sum_names, self._pending
        values = metrics.means(names, sums)
        log.train(
            self._row(step)
            | {"batch_loss": metrics.means(names, progress.last)["loss"], **values}
            | {"examples_per_second": float(sums[names.index("weight")]) / max(seconds, 1e-9)}
        )
        self._pending = np.zeros(len(names))
        return values

    def _row(self, step: int) -> metrics.Row:
        schedule = self._parts.inputs["train"].schedule
        epoch = -(-step // schedule.steps_per_epoch)
        return {"step": step, "epoch": epoch, "examples": schedule.examples_until(step)}

    def _stop_message(self, step: int) -> str:
        signal = self._request.signal
        by = signal.name if signal is not None else "a signal to another worker"
        saved = "" if self._workdir is None else f", saved; --workdir={self._workdir.path} goes on"
        return f"by {by} after step {step}{saved}"

    def _result(self, results: dict[str, Means], step: int) -> Result:
        path = None if self._workdir is None else str(self._workdir.path)
        return Result(metrics=results, model=self._parts.model, step=step, workdir=path)
