"""The loop: a whole run, from the task to the exported model."""

import contextlib
import dataclasses
import json
import os
import time
import zlib
from collections.abc import Callable, Iterator, Mapping

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from dist_train import allocator, metrics, optimizers, prediction, replicas, versions, watchdog
from dist_train import task as tasks
from dist_train.build import Parts
from dist_train.cluster import Cluster
from dist_train.config import Config
from dist_train.divergence import Divergence
from dist_train.errors import Stopped, WorkerLost
from dist_train.examples import digest
from dist_train.follower import follow
from dist_train.heartbeat import Heartbeat
from dist_train.log import RunLog
from dist_train.outcome import Outcome
from dist_train.pace import Pace
from dist_train.profiling import Profile
from dist_train.progress import Progress
from dist_train.result import Means, Result
from dist_train.rows import Row
from dist_train.state import State
from dist_train.stopping import StopRequest
from dist_train.timesheet import Timesheet
from dist_train.timetable import Timetable
from dist_train.workdir import Workdir
from dist_train.workers import Workers

_SLOW_INPUT = "the input: more than {seconds}; raise --stall_timeout_s if that is right"
_SHARES = ("input", "communication", "evaluation", "saving")


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
        workers = Workers(strategy, cluster, stall_timeout_s=config.stall_timeout_s)
        loop = _Loop(resolved, config, strategy, workers, workdir, request)
        modes = {
            "train": loop.train,
            "evaluate": loop.evaluate,
            "follow": loop.follow,
            "predict": loop.predict,
        }
        return modes[config.mode]()
    except WorkerLost as error:
        if request.signal is None:
            raise
        # Those who were asked as well may have gone before the step in which all would have saved.
        raise Stopped(
            f"by {request.signal.name}, but not at the end of a step ({error}); the last checkpoint"
            " is intact"
        ) from error
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
        self._times = Timetable(
            steps_per_epoch=self._parts.inputs["train"].schedule.steps_per_epoch,
            total_steps=self._parts.total_steps,
            log_steps=config.log_steps,
            eval_epochs=config.eval_epochs,
            checkpoint_steps=config.checkpoint_steps,
            checkpoint_secs=config.checkpoint_secs,
        )
        self._state = State(
            self._parts, config, strategy, workers, workdir, scheduled=self._times.schedules
        )
        self._task = task
        self._divergence = Divergence(config.on_nan, workers, self._parts.weight_digests)
        self._outcome: Outcome | None = None
        if workdir is not None:
            self._outcome = Outcome(
                task, self._parts, config, strategy, workdir, workers=workers.count
            )

    def train(self) -> Result:
        """From the newest checkpoint, or from the beginning, to the exported model."""
        step = self._state.restore()
        with self._log(step) as log, contextlib.ExitStack() as stack:
            self._state.log = log
            try:
                results, step = self._fit(step, log, stack)
            finally:
                self._state.close()  # what was begun before an error is written all the same
            self._state.take_best(step)
            if (test := self._evaluate("test")) is not None:
                results["test"] = test
                log.evaluation("test", self._row(step) | test)
            if self._outcome is not None:
                self._outcome.write(step, results, log, self._heartbeat.beat)
        if self._outcome is not None:  # its log is whole only now
            self._outcome.tell()
        self._leave()
        return self._result(results, step)

    def evaluate(self) -> Result:
        """The newest checkpoint, or the one asked for, on the validation and test examples."""
        step = self._state.restore()
        results = {}
        for kind in ("validation", "test"):
            if (values := self._evaluate(kind)) is not None:
                results[kind] = values
                shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
                level = logging.INFO if self._workers.is_chief else logging.DEBUG
                logging.log(level, "step %s  %s: %s", f"{step:,}", kind, shown)
        self._leave()
        return self._result(results, step)

    def predict(self) -> Result:
        """What a checkpoint says of files."""
        step = self._state.restore()
        with optimizers.averaged_weights(self._strategy, self._parts.model, self._parts.optimizer):
            count = prediction.write(
                prediction.rows(self._task.train, self._parts.program, self._config),
                self._config.output,
            )
        logging.info("%s examples, by the weights of step %s", f"{count:,}", f"{step:,}")
        return self._result({}, step)

    def follow(self) -> Result:
        """Each checkpoint on the validation examples, as the run that trains writes it."""
        checkpoints = self._state.checkpoints
        assert checkpoints is not None
        assert self._workdir is not None
        results, step = follow(
            checkpoints,
            self._workdir,
            self._request,
            is_over=self._state.is_over,
            timeout_s=self._config.stall_timeout_s,
            validate=lambda: self._evaluate("validation"),
            row=self._row,
        )
        return self._result(results, step)

    def _fit(
        self, step: int, log: RunLog, stack: contextlib.ExitStack
    ) -> tuple[dict[str, Means], int]:
        """All steps from `step` to the last; the last means of each kind, and the last step.

        Args:
          stack: gets what is to last from the first step to the end of the run.
        """
        config, parts, times = self._config, self._parts, self._times
        train = parts.inputs["train"]
        pace, sheet = Pace(config.steps_per_loop), Timesheet(_SHARES)
        reduction_s: float | None = None
        call_steps = pace.wish
        self._tally = self._restored_tally()
        folder = None if self._workdir is None else self._workdir.tensorboard
        profile = Profile(config.profile_range, folder)
        results: dict[str, Means] = {}
        chunks, current = None, -1
        saved = time.monotonic()
        self._request.watch_from(parts.train_loop.request_stop)
        if step == 0 and config.on_nan == "restore":
            self._state.save(0)
        while not self._state.is_over(step):
            number, begin, left = train.schedule.locate(step)
            if number != current:
                chunks = chunks or train.chunks(number)
                with sheet.on("input"), watchdog.bound(config.stall_timeout_s, _SLOW_INPUT):
                    chunk, current = next(chunks), number
            profile.reach(step)
            to_line = times.steps_to_line(step)
            count = min(
                left,
                times.steps_to_next(step),
                call_steps,
                profile.steps_to_next(step),
                parts.train_loop.most_steps(to_line),
            )
            with self._workers.together(f"steps {step + 1} to {step + count}"), pace.call():
                lines = parts.train_loop(
                    train.data, chunk, begin, begin + count, pace.wish, to_line=to_line
                )
            done, last = sum(progress.steps for progress in lines), lines[-1]
            pace.done(done)
            if reduction_s is None:  # only now do all workers have their first step behind them
                with self._workers.together("the timing of the reduction"):
                    reduction_s = parts.train_loop.time_reduction()
                sheet.take()  # the start is nobody's share
                stack.enter_context(allocator.keeping_memory(os.environ))
            sheet.add("communication", done * reduction_s)
            log.advance(done)
            self._heartbeat.beat(step + done)
            self._state.check()
            shares, to_tell = None, done
            for progress in lines:
                step += progress.steps
                to_tell -= progress.steps
                self._tally.add(progress.sums, pace.seconds * progress.steps / done)
                if self._divergence.check(step, progress):
                    self._rewind(step, progress.last[0])
                if times.logs(step):
                    shares = shares or sheet.take()
                    ago_s = pace.seconds * to_tell / done
                    results["train"] = self._log_train(step, progress, log, shares, ago_s)
            call_steps = last.next_steps
            best = False
            if times.validates(step):
                with sheet.on("evaluation"):
                    values = self._evaluate("validation")
                if values is not None:
                    results["validation"] = values
                    log.evaluation("validation", self._row(step) | values)
                    best = self._parts.best.see(values[config.best_metric], step)
            over = self._state.is_over(step)
            if over and not times.logs(step):
                results["train"] = self._log_train(step, last, log, sheet.take())
            stop = self._must_stop(last) and not over
            if over or stop or best or times.saves(step, time.monotonic() - saved):
                parts.pending.assign(self._tally.sums)
                with sheet.on("saving"):
                    self._state.save(step, best=best)
                saved = time.monotonic()
            if stop:
                self._state.settle()
                self._leave()
                raise Stopped(self._stop_message(step))
        profile.close()
        return results, step

    def _evaluate(self, kind: str) -> Means | None:
        """The exact means over all examples of `kind`, or None if the task has none."""
        inputs = self._parts.inputs.get(kind)
        if inputs is None:
            return None
        names = self._parts.program.sum_names
        total = np.zeros(len(names))
        with (
            self._workers.together(f"the {kind}"),
            optimizers.averaged_weights(self._strategy, self._parts.model, self._parts.optimizer),
        ):
            for chunk, steps in inputs.first_epoch():
                total += self._parts.evaluation(inputs.data, chunk, steps)
                self._heartbeat.beat()
        return metrics.means(names, total)

    # Workers that agree.

    def _check_same_data(self, task: tasks.Task) -> None:
        """Settings again: a second run in a process does without the rendezvous."""
        if self._workers.count == 1:
            return
        settings = json.dumps(self._config.shared(), sort_keys=True)
        mine = {"settings": zlib.crc32(settings.encode())}
        for kind in ("train", "validation", "test"):
            source = getattr(task, kind)
            mine[f"{kind} examples"] = 0 if source is None else digest(source)
        with self._workers.together("the comparison of the data"):
            self._workers.check_alike(mine)

    def _rewind(self, step: int, loss: float) -> None:
        restored = self._state.rewind(step)
        self._tally = self._restored_tally()
        logging.log(
            logging.WARNING if self._workers.is_chief else logging.DEBUG,
            "the loss of step %s is %s: back to the weights of step %s, and on with step %s",
            step, loss, restored, step + 1,
        )  # fmt: skip

    def _restored_tally(self) -> metrics.Tally:
        return metrics.Tally(self._parts.program.sum_names, self._parts.pending.numpy())

    def _must_stop(self, progress: Progress) -> bool:
        # With several workers only what came through the collective counts: all see it at once.
        return progress.stop or (self._workers.count == 1 and self._request.signal is not None)

    def _leave(self) -> None:
        """Workers leave together: one that exits early makes TensorFlow fail the others."""
        with self._workers.together("the end"):
            self._workers.barrier()

    # What is said.

    @contextlib.contextmanager
    def _log(self, step: int) -> Iterator[RunLog]:
        """The chief's log, after a block that says what is about to run; the others' is silent."""
        if self._workdir is None:
            yield RunLog()
            return
        config, count, numbers = self._config, self._workers.count, versions.installed()
        self._workdir.write_config(dataclasses.asdict(config), numbers)
        logging.info(
            "%s\nstrategy %s, %d worker%s, %s each\n%s\nworkdir %s%s",
            "  ".join(f"{name} {number}" for name, number in numbers.items()),
            config.strategy,
            count,
            "" if count == 1 else "s",
            replicas.describe(self._strategy.num_replicas_in_sync // count),
            "\n".join(self._parts.describe()),
            self._workdir.name,
            f", resumed after step {step:,}" if step else "",
        )
        with RunLog.opened(
            self._workdir.metrics,
            self._workdir.tensorboard,
            step=step,
            total_steps=self._parts.total_steps,
            progress=config.progress,
        ) as log:
            log.settings(dataclasses.asdict(config))
            yield log

    def _log_train(
        self,
        step: int,
        progress: Progress,
        log: RunLog,
        shares: Mapping[str, float],
        ago_s: float = 0.0,
    ) -> Means:
        names = self._parts.program.sum_names
        tally, self._tally = self._tally, metrics.Tally(names)
        values = tally.means()
        log.train(
            self._row(step)
            | {"batch_loss": metrics.means(names, progress.last)["loss"], **values}
            | {"gradient_norm": progress.gradient_norm}
            | {"examples_per_second": tally.examples_per_second()},
            also={
                "learning_rate": progress.learning_rate,
                **{f"time_in_{name}": share for name, share in shares.items()},
            },
            waiting=shares["input"],
            ago_s=ago_s,
        )
        return values

    def _row(self, step: int) -> Row:
        schedule = self._parts.inputs["train"].schedule
        epoch = -(-step // schedule.steps_per_epoch)
        return {"step": step, "epoch": epoch, "examples": schedule.examples_until(step)}

    def _stop_message(self, step: int) -> str:
        signal = self._request.signal
        by = signal.name if signal is not None else "a signal to another worker"
        saved = "" if self._workdir is None else f", saved; --workdir={self._workdir.name} goes on"
        return f"by {by} after step {step:,}{saved}"

    def _result(self, results: dict[str, Means], step: int) -> Result:
        path = None if self._workdir is None else self._workdir.name
        return Result(metrics=results, model=self._parts.model, step=step, workdir=path)
