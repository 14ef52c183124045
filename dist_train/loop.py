"""The loop: a whole run, from the task to the exported model."""

import contextlib
import dataclasses
import json
import os
import zlib
from collections.abc import Callable, Iterator

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from dist_train import environments, metrics, prediction, replicas, versions
from dist_train import task as tasks
from dist_train.build import Parts
from dist_train.errors import RunError, Stopped, WorkerLost, one_line
from dist_train.examples import digest
from dist_train.fit import Fit
from dist_train.follower import follow
from dist_train.heartbeat import Heartbeat
from dist_train.log import RunLog
from dist_train.outcome import Outcome
from dist_train.result import Means, Result
from dist_train.session import Session
from dist_train.state import State
from dist_train.timetable import Timetable
from dist_train.workers import Workers


def run(task: "tasks.Task | Callable[..., tasks.Task] | None", session: Session) -> Result:
    """Trains or evaluates; see `start.train`."""
    config, request = session.config, session.request
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(config.dtype)
    if config.determinism:
        tf.config.experimental.enable_op_determinism()
    try:
        resolved = tasks.load(config.task, config) if task is None else tasks.resolve(task, config)
        loop = _Loop(resolved, session)
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
            f"by {request.signal.name}, but not at the end of a step ({error}); what was saved"
            " before is intact"
        ) from error
    finally:
        keras.config.set_dtype_policy(policy)


class _Loop:
    def __init__(self, task: tasks.Task, session: Session):
        config, strategy, workdir = session.config, session.strategy, session.workdir
        workers = Workers(strategy, session.cluster, stall_timeout_s=config.stall_timeout_s)
        self._session = session
        self._config = config
        self._workers = workers
        self._workdir = workdir
        self._heartbeat = Heartbeat(os.environ)
        self._check_same_data(task)
        self._parts = Parts(task, config, strategy, workers)
        self._times = Timetable(
            steps_per_epoch=self._parts.inputs["train"].schedule.steps_per_epoch,
            total_steps=self._parts.total_steps,
            log_steps=self._parts.log_steps,
            eval_epochs=config.eval_epochs,
            checkpoint_steps=config.checkpoint_steps,
            checkpoint_secs=config.checkpoint_secs,
        )
        self._state = State(self._parts, session, workers, scheduled=self._times.schedules)
        self._task = task
        self._outcome: Outcome | None = None
        if workdir is not None:
            self._outcome = Outcome(task, self._parts, config, workers, workdir)

    def train(self) -> Result:
        """From the newest checkpoint, or from the beginning, to the exported model."""
        step = self._state.restore()
        with self._log(step) as log:
            self._state.log = log
            fit = Fit(
                self._session,
                self._workers,
                self._parts,
                self._state,
                log,
                self._heartbeat,
                times=self._times,
                validate=lambda: self._evaluate("validation"),
            )
            try:
                results, step = fit.run(step)
            finally:
                self._state.close()  # what was begun before an error is written all the same
            if not results and self._times.validates(step):  # it was finished before this start
                results = self._validated()
            self._state.take_best(step)
            if (test := self._evaluate("test")) is not None:
                results["test"] = test
                log.evaluation("test", self._parts.row(step) | test)
            if self._outcome is not None:
                self._write(self._outcome, step, results, log)
        if self._outcome is not None:  # its log is whole only now
            self._outcome.tell()
        self._workers.leave()
        return self._result(results, step)

    def evaluate(self) -> Result:
        """The newest checkpoint, or the one asked for, on the validation and test examples."""
        step = self._state.restore()
        results = {}
        for kind in ("validation", "test"):
            if (values := self._evaluate(kind)) is not None:
                results[kind] = values
                shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
                self._workers.log(logging.INFO, "step %s  %s: %s", f"{step:,}", kind, shown)
        self._workers.leave()
        return self._result(results, step)

    def predict(self) -> Result:
        """What a checkpoint says of files."""
        step = self._state.restore()
        with self._parts.averaged_weights():
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
        workdir, trajectory = self._workdir, self._config.trajectory()
        results, step = follow(
            checkpoints,
            workdir,
            self._session.request,
            is_over=self._is_over_there,
            timeout_s=self._config.stall_timeout_s,
            validate=lambda: self._evaluate("validation"),
            row=self._parts.row,
            check=lambda: workdir.check_resumable(trajectory),
        )
        if not self._state.is_over(step):
            logging.warning(
                "workdir=%s: its run ends after step %s by its config.json, whatever --epochs and"
                " --early_stopping are here; if it is resumed for more, start this again",
                workdir.name, f"{step:,}",
            )  # fmt: skip
        return self._result(results, step)

    def _is_over_there(self, step: int) -> bool:
        """`State.is_over` by the settings of the run that is followed, which may be others.

        The launcher's evaluator was started with the run's own, before the chief has written them.
        """
        assert self._workdir is not None
        if environments.is_evaluator(os.environ):
            return self._state.is_over(step)
        theirs = self._workdir.settings()
        names = ("epochs", "early_stopping", "eval_epochs")
        end = dataclasses.replace(self._config, **{n: theirs[n] for n in names if n in theirs})
        return self._state.is_over(step, config=end)

    def _evaluate(self, kind: str) -> Means | None:
        """The exact means over all examples of `kind`, or None if the task has none."""
        inputs = self._parts.inputs.get(kind)
        if inputs is None:
            return None
        names = self._parts.program.sum_names
        total = np.zeros(len(names))
        with self._workers.together(f"the {kind}"), self._parts.averaged_weights():
            for chunk, steps in inputs.first_epoch():
                total += self._parts.evaluation(inputs.data, chunk, steps)
                self._heartbeat.beat()
        return metrics.means(names, total)

    def _validated(self) -> dict[str, Means]:
        values = self._evaluate("validation")
        return {} if values is None else {"validation": values}

    def _write(self, outcome: Outcome, step: int, results: dict[str, Means], log: RunLog) -> None:
        try:
            outcome.write(step, results, log, self._heartbeat.beat)
        except (OSError, tf.errors.OpError) as error:
            raise RunError(
                f"the training is finished and saved, but what follows from it cannot be written:"
                f" {one_line(error)}; the same command writes it when it can be"
            ) from error

    # Workers that agree.

    def _check_same_data(self, task: tasks.Task) -> None:
        """Raises UsageError if a worker has other examples, or settings.

        The settings were compared at the rendezvous, which a second run in a process does without.
        """
        if self._workers.count == 1:
            return
        settings = json.dumps(self._config.shared(), sort_keys=True)
        mine = {"settings": zlib.crc32(settings.encode())}
        for kind in ("train", "validation", "test"):
            source = getattr(task, kind)
            mine[f"{kind} examples"] = 0 if source is None else digest(source)
        with self._workers.together("the comparison of the data"):
            self._workers.check_alike(mine)

    # What is said.

    @contextlib.contextmanager
    def _log(self, step: int) -> Iterator[RunLog]:
        """The chief's log, after a block that says what is about to run; the others' is silent."""
        if self._workdir is None:
            yield RunLog()
            return
        config, count, numbers = self._config, self._workers.count, versions.installed()
        outline = self._parts.outline
        changed = self._workdir.changed(outline) if step else []
        self._workdir.write_config(dataclasses.asdict(config), numbers, outline)
        if changed:
            logging.warning(
                "workdir=%s was begun with other settings of the task (%s): it goes on from there,"
                " and the numbers are not those of one run; for a run of its own use another"
                " --workdir", self._workdir.name, ", ".join(changed),
            )  # fmt: skip
        logging.info(
            "%s\nstrategy %s, %d worker%s, %s each\n%s\nworkdir %s%s",
            "  ".join(f"{name} {number}" for name, number in numbers.items()),
            config.strategy,
            count,
            "" if count == 1 else "s",
            replicas.describe(self._workers.local_replicas),
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

    def _result(self, results: dict[str, Means], step: int) -> Result:
        path = None if self._workdir is None else self._workdir.name
        return Result(metrics=results, model=self._parts.model, step=step, workdir=path)
