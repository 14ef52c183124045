"""Fit: the steps of a run, call by call, and what is to be done between two calls."""

import contextlib
import math
import os
import time
from collections.abc import Callable, Mapping

from absl import logging

from dist_train import allocator, metrics, watchdog
from dist_train.build import Parts
from dist_train.divergence import Divergence
from dist_train.errors import Stopped
from dist_train.heartbeat import Heartbeat
from dist_train.input import Chunk, Forward
from dist_train.line import Line
from dist_train.log import RunLog
from dist_train.pace import Pace
from dist_train.profiling import Profile
from dist_train.result import Means
from dist_train.session import Session
from dist_train.state import State
from dist_train.timesheet import Timesheet
from dist_train.timetable import Timetable
from dist_train.workers import Workers

_SLOW_INPUT = "the input: more than {seconds}; raise --stall_timeout_s if that is right"
_SHARES = ("input", "communication", "evaluation", "saving")


class Fit:
    """Trains. All workers do the same, and the chief's log and state write it down.

    Args:
      session, workers, parts, state, log, heartbeat: of the run.
      times: after which steps to log, validate and save.
      validate: the means over the validation examples, or None if there are none.
    """

    def __init__(
        self,
        session: Session,
        workers: Workers,
        parts: Parts,
        state: State,
        log: RunLog,
        heartbeat: Heartbeat,
        *,
        times: Timetable,
        validate: Callable[[], Means | None],
    ):
        config = session.config
        self._session = session
        self._config = config
        self._workers = workers
        self._parts = parts
        self._state = state
        self._log = log
        self._heartbeat = heartbeat
        self._times = times
        self._validation = validate
        self._chunks = Forward(parts.inputs["train"])
        self._pace = Pace(config.steps_per_loop)
        self._sheet = Timesheet(_SHARES)
        folder = None if session.workdir is None else session.workdir.tensorboard
        self._profile = Profile(config.profile_range, folder)
        self._divergence = Divergence(config.on_nan, workers, parts.weight_digests)
        self._tally = self._restored_tally()
        self._reduction_s: float | None = None
        self._seconds = 0.0  # that the last call took, the wait for its input included
        self._saved_at = time.monotonic()
        self._results: dict[str, Means] = {}

    def run(self, step: int) -> tuple[dict[str, Means], int]:
        """Trains on from `step`; the last means of each kind, and the last step.

        Raises:
          RunError: a worker was lost, a loss is not finite, a checkpoint cannot be written.
          Stopped: a signal asked to stop, and the state is saved.
        """
        self._session.request.watch_from(self._parts.train_loop.request_stop)
        if step == 0 and self._config.on_nan == "restore":
            self._state.save(0)
        with contextlib.ExitStack() as stack:
            while not self._state.is_over(step):
                lines = self._call(step)
                if self._reduction_s is None:
                    self._time_reduction()
                    stack.enter_context(allocator.keeping_memory(os.environ))
                step = self._take_in(step, lines)
                is_best = self._validate(step)
                self._save(step, lines[-1], is_best)
        self._profile.close()
        return self._results, step

    def _call(self, step: int) -> list[Line]:
        """As many steps as the pace allows and nothing interrupts."""
        loop, times = self._parts.train_loop, self._times
        self._profile.reach(step)
        began_at = time.perf_counter()
        chunk, begin, left = self._chunk(step)
        to_line = times.steps_to_line(step)
        steps = min(
            left,
            times.steps_to_next(step),
            self._profile.steps_to_next(step),
            self._pace.steps,
            loop.most_steps(to_line),
        )
        data = self._parts.inputs["train"].data
        with self._workers.together(f"steps {step + 1} to {step + steps}"), self._pace.call():
            lines = loop(data, chunk, begin, begin + steps, self._pace.wish, to_line=to_line)
        self._seconds = time.perf_counter() - began_at
        return lines

    def _chunk(self, step: int) -> tuple[Chunk, int, int]:
        """The chunk with a step, the step's place in it, and how many steps it still has."""
        with self._sheet.on("input"), watchdog.bound(self._config.stall_timeout_s, _SLOW_INPUT):
            return self._chunks.at(step)

    def _time_reduction(self) -> None:
        # Only now do all workers have their first step behind them.
        with self._workers.together("the timing of the reduction"):
            self._reduction_s = self._parts.train_loop.time_reduction()
        self._sheet.take()  # the start is nobody's share

    def _take_in(self, step: int, lines: list[Line]) -> int:
        """Counts, examines and logs what a call has done; the step after it."""
        end = step + sum(line.steps for line in lines)
        self._pace.done(end - step, agreed=lines[-1].next_steps)
        assert self._reduction_s is not None
        self._sheet.add("communication", (end - step) * self._reduction_s)
        self._log.advance(end - step)
        self._heartbeat.beat(end)
        self._state.check()
        step_s, shares = self._seconds / (end - step), None
        for line in lines:
            step += line.steps
            self._tally.add(line.sums, line.steps * step_s)
            # What a line would be about is undone by a rewind.
            if self._divergence.check(step, line):
                self._rewind(step, f"the loss of step {step} is {line.last_loss}")
            elif step == end and self._ends_not_finite(step):
                self._rewind(step, f"the weights after step {step} are not finite")
            elif self._times.logs(step):
                shares = shares or self._sheet.take()
                self._write(step, line, shares, ago_s=(end - step) * step_s)
        return step

    def _ends_not_finite(self, step: int) -> bool:
        """Whether weights are not finite that no loss would show, as the run may end here."""
        if self._config.on_nan != "restore":
            return False
        more = int(self._times.validates(step))
        return self._state.is_over(step, more=more) and not self._state.is_finite()

    def _rewind(self, step: int, why: str) -> None:
        restored = self._state.rewind(step, why)
        self._tally = self._restored_tally()
        self._workers.log(
            logging.WARNING,
            "%s: back to the weights of step %s, and on with step %s",
            why, restored, step + 1,
        )  # fmt: skip

    def _restored_tally(self) -> metrics.Tally:
        return metrics.Tally(self._parts.program.sum_names, self._parts.pending.numpy())

    def _write(
        self, step: int, line: Line, shares: Mapping[str, float], ago_s: float = 0.0
    ) -> None:
        """A row of the log, over the steps since the one before.

        Args:
          shares: of the time, by what it was spent on.
          ago_s: how long ago the step was done, in seconds.
        """
        names = self._parts.program.sum_names
        tally, self._tally = self._tally, metrics.Tally(names)
        self._results["train"] = tally.means()
        self._log.train(
            self._parts.row(step)
            | {"batch_loss": metrics.means(names, line.last)["loss"], **tally.means()}
            | {"gradient_norm": line.gradient_norm}
            | {"examples_per_second": tally.examples_per_second()},
            also={
                "learning_rate": line.learning_rate,
                **{f"time_in_{name}": share for name, share in shares.items()},
            },
            waiting=shares["input"],
            ago_s=ago_s,
        )

    def _validate(self, step: int) -> bool:
        """A validation, if it is time; whether it was the best so far."""
        if not self._times.validates(step):
            return False
        with self._sheet.on("evaluation"):
            values = self._validation()
        if values is None:
            return False
        self._results["validation"] = values
        if not math.isfinite(values["loss"]):
            self._workers.log(
                logging.WARNING, "the validation loss of step %s is %s", step, values["loss"]
            )
        self._log.evaluation("validation", self._parts.row(step) | values)
        return self._parts.best.see(values[self._config.best_metric], step)

    def _save(self, step: int, line: Line, is_best: bool) -> None:
        """A checkpoint, if it is time, or if the run ends here.

        Args:
          line: the last one.

        Raises:
          Stopped: it was asked for.
        """
        over = self._state.is_over(step)
        if over and not self._times.logs(step):  # early stopping; what is counted would be lost
            self._write(step, line, self._sheet.take())
        stop = self._must_stop(line) and not over
        if over or stop or is_best or self._times.saves(step, time.monotonic() - self._saved_at):
            self._parts.pending.assign(self._tally.sums)
            with self._sheet.on("saving"):
                self._state.save(step, best=is_best)
            self._saved_at = time.monotonic()
        if stop:
            self._state.settle()
            self._workers.leave()
            raise Stopped(self._stop_message(step))

    def _must_stop(self, line: Line) -> bool:
        # With several workers only what came through the collective counts: all see it at once.
        alone = self._workers.count == 1
        return line.stop or (alone and self._session.request.signal is not None)

    def _stop_message(self, step: int) -> str:
        signal, workdir = self._session.request.signal, self._session.workdir
        by = signal.name if signal is not None else "a signal to another worker"
        saved = "" if workdir is None else f", saved; --workdir={workdir.name} goes on"
        return f"by {by} after step {step:,}{saved}"
