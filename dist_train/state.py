"""State: what a run is, on its way between the variables, the checkpoints and the workers."""

from collections.abc import Callable

import numpy as np
import tensorflow as tf
from absl import logging

from dist_train import layers, watchdog
from dist_train.build import Parts, load_weights
from dist_train.checkpoint import Checkpoints, NotFinite, is_finite
from dist_train.config import Config
from dist_train.errors import RunError, UsageError
from dist_train.log import RunLog
from dist_train.session import Session
from dist_train.settings import differences
from dist_train.storage import opened
from dist_train.workers import Workers

_MOST_REWINDS = 3


class State:
    """The state of one run. On the chief it is read and written, on the others received.

    Args:
      parts: whose variables are the state.
      session, workers: of the run.
      scheduled: whether every run of these settings makes a checkpoint after a step.
    """

    def __init__(
        self,
        parts: Parts,
        session: Session,
        workers: Workers,
        *,
        scheduled: Callable[[int], bool],
    ):
        config, workdir = session.config, session.workdir
        self._parts = parts
        self._config = config
        self._strategy = session.strategy
        self._workers = workers
        self._workdir = workdir
        self._scheduled = scheduled
        self._rewinds = 0
        self.log = RunLog()
        self.checkpoints: Checkpoints | None = None
        if workdir is not None:
            self.checkpoints = Checkpoints(
                opened(workdir.checkpoints),
                parts.checkpoint,
                keep=config.keep_checkpoints,
                pins=scheduled,
                before=self._make_durable,
            )

    def restore(self) -> int:
        """The state of a checkpoint, or the initial one, on every worker; its step.

        Raises:
          UsageError: there is nothing to evaluate.
          RunError: all checkpoints are damaged, or the newest cannot be read for now.
        """
        config, step = self._config, None
        if self.checkpoints is not None:
            step = self.checkpoints.restore(config.checkpoint)
            if step is None and config.mode != "train":
                raise UsageError(f"workdir={config.workdir} has no checkpoint to {config.mode}")
            if step is None and config.initial_weights is not None:
                load_weights(self._parts.model, config.initial_weights)
            if step is not None and config.mode == "train":
                self._go_on_with_best(step)
        self._hand_out()
        return int(self._parts.step.numpy())

    def _go_on_with_best(self, step: int) -> None:
        """After a restore: sees to it that the best is of this run's metric, and is there."""
        assert self.checkpoints is not None
        assert self._workdir is not None
        best = self._parts.best
        before = self._workdir.settings()
        mine = {name: getattr(self._config, name) for name in ("best_metric", "best_mode")}
        if changed := differences(mine, {name: before.get(name, mine[name]) for name in mine}):
            best.forget()
            # At once: config.json, which is about to be written, will show no change any more.
            self.checkpoints.save(step, anew=True)
            self.settle()
            shown = ", ".join(f"{name}={a} (was {b})" for name, (a, b) in changed.items())
            logging.warning(
                "%s: the best validation and the count of --early_stopping begin anew after step"
                " %s", shown, f"{step:,}",
            )  # fmt: skip
        if best.step is not None:
            self.checkpoints.mend_best(best.step)

    def save(self, step: int, *, best: bool = False) -> None:
        """Begins a checkpoint of the state after `step`; the training may go on meanwhile.

        Args:
          best: whether it is the best one by validation so far.

        Raises:
          RunError: the one before could not be written.
        """
        self._parts.step.assign(step)
        self._rewinds = 0
        if self.checkpoints is None:
            return
        with watchdog.bound(
            self._config.stall_timeout_s,
            f"the checkpoint before that of step {step}: writing it took more than {{seconds}};"
            " raise --stall_timeout_s if that is right",
        ):
            self._ignoring_not_finite(self.checkpoints.wait)
            self.checkpoints.save(step, best=best)

    def settle(self) -> None:
        """Returns when all checkpoints that were begun are written; raises as `save` does."""
        if self.checkpoints is None:
            return
        with watchdog.bound(
            self._config.stall_timeout_s,
            "the last checkpoint: writing it took more than {seconds};"
            " raise --stall_timeout_s if that is right",
        ):
            self._ignoring_not_finite(self.checkpoints.wait)

    def close(self) -> None:
        """As `settle`; nothing is saved afterwards."""
        try:
            self.settle()
        finally:
            if self.checkpoints is not None:
                self.checkpoints.close()

    def check(self) -> None:
        """Raises RunError if a checkpoint could not be written in the meantime."""
        if self.checkpoints is not None:
            self._ignoring_not_finite(self.checkpoints.check)

    def is_finite(self) -> bool:
        """Whether all weights are, on every worker; all of them must ask."""
        mine = all(is_finite(weight.numpy()) for weight in self._parts.model.trainable_variables)
        with self._workers.together("the check of the weights"):
            return bool(np.all(self._workers.gather([mine])))

    def rewind(self, step: int, why: str) -> int:
        """Gives every worker the state of the last scheduled checkpoint before `step`; its step.

        Only a scheduled one, so that a run that was stopped in between ends up the same. The best
        validation so far is not forgotten.

        Args:
          why: what is wrong, for messages.

        Raises:
          RunError: that was tried too often since the last checkpoint.
        """
        self._rewinds += 1
        if self._rewinds > _MOST_REWINDS:
            raise RunError(
                f"{why}, though the run went back to its last checkpoint"
                f" {_MOST_REWINDS} times; try a smaller --learning_rate, or --clip_norm"
            )
        best = self._parts.best.variable.numpy()
        if self.checkpoints is not None:
            self.settle()
            targets = [s for s in self.checkpoints.steps() if s < step and self._scheduled(s)]
            if not targets:
                raise RunError(
                    f"{why}, and there is no checkpoint before it to go back to;"
                    " use a smaller --checkpoint_steps"
                )
            self.checkpoints.restore(str(targets[-1]))
        self._hand_out()
        self._parts.best.variable.assign(best)
        self._parts.pending.assign(tf.zeros_like(self._parts.pending))
        return int(self._parts.step.numpy())

    def is_over(self, step: int, *, more: int = 0, config: Config | None = None) -> bool:
        """Whether nothing is left to train: the last step is done, or early stopping ends it.

        Args:
          more: as if so many validations followed, none of them better.
          config: whose epochs and patience hold; None: those of this process.
        """
        config = config or self._config
        last = config.epochs * self._parts.inputs["train"].schedule.steps_per_epoch
        return step >= last or 0 < config.early_stopping <= self._parts.best.since + more

    def take_best(self, step: int) -> None:
        """With early stopping, gives every worker the weights of the best validation.

        Args:
          step: the last one that was done; the weights are those after it.

        Raises:
          RunError: their checkpoint is not there, or damaged.
        """
        best = self._parts.best.step
        if not self._config.early_stopping or best in (None, step):
            return
        self.settle()
        if self.checkpoints is not None:
            self.checkpoints.restore_best(best)
            logging.info("test and exports use the best weights, those of step %s", f"{best:,}")
        self._hand_out()

    def _hand_out(self) -> None:
        with self._workers.together("the broadcast of the state"):
            self._workers.broadcast(self._parts.variables)
        layers.separate_randomness(self._strategy, self._parts.model)

    def _ignoring_not_finite(self, act: Callable[[], None]) -> None:
        """With --on_nan=restore weights that are not finite are no end: the next step rewinds."""
        try:
            act()
        except NotFinite as error:
            if self._config.on_nan != "restore":
                raise
            logging.warning("no checkpoint: %s", error)

    def _make_durable(self) -> None:
        """Before a checkpoint appears: the rows of the log up to its step."""
        assert self._workdir is not None
        self._workdir.check_present()
        self.log.sync()
        self._workdir.push()
