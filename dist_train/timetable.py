"""Timetable: after which steps a run logs, validates and saves."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timetable:
    """Periods in steps, unless the name says otherwise; see the settings of the same names."""

    steps_per_epoch: int
    total_steps: int
    log_steps: int
    eval_epochs: int = 0
    checkpoint_steps: int | None = None
    checkpoint_secs: float | None = None

    def steps_to_next(self, step: int) -> int:
        """Steps until a call must end, for a validation or a checkpoint; a line needs no end."""
        periods = [self.steps_per_epoch]
        if self.checkpoint_steps is not None:
            periods.append(self.checkpoint_steps)
        return min(period - step % period for period in periods)

    def steps_to_line(self, step: int) -> int:
        """Steps until a line of the log is due, from 1."""
        return self.log_steps - step % self.log_steps

    def logs(self, step: int) -> bool:
        """Whether a line of the log is due after `step` steps."""
        return step % self.log_steps == 0 or step == self.total_steps

    def validates(self, step: int) -> bool:
        """Whether a validation is due after `step` steps."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return within == 0 and self.eval_epochs > 0 and epoch % self.eval_epochs == 0

    def saves(self, step: int, seconds: float) -> bool:
        """Whether a checkpoint is due after `step` steps, `seconds` after the one before."""
        if self.checkpoint_secs is not None and seconds >= self.checkpoint_secs:
            return True
        return self.schedules(step)

    def schedules(self, step: int) -> bool:
        """Whether a checkpoint is due after `step` steps however long they take."""
        if self.checkpoint_steps is not None:
            return step % self.checkpoint_steps == 0 or step == self.total_steps
        return step % self.steps_per_epoch == 0
