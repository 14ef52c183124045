"""Follower: evaluates each checkpoint of another process's run as it is written."""

import contextlib
import time
from collections.abc import Callable

from dist_train.checkpoint import Checkpoints
from dist_train.errors import RunError, Stopped
from dist_train.log import Console, RunLog
from dist_train.rows import MetricsFile, Row
from dist_train.stopping import StopRequest
from dist_train.workdir import Workdir

_POLL_S = 0.5


def follow(
    checkpoints: Checkpoints,
    workdir: Workdir,
    request: StopRequest,
    *,
    is_over: Callable[[int], bool],
    timeout_s: float,
    validate: Callable[[], dict[str, float] | None],
    row: Callable[[int], Row],
    check: Callable[[], None],
) -> tuple[dict[str, dict[str, float]], int]:
    """Until the checkpoint of the last step, which the other process writes.

    The rows of an earlier start stay, up to the first checkpoint that is evaluated now.

    Args:
      checkpoints, workdir: of the run.
      request: to stop.
      is_over: whether a step, whose checkpoint was restored, is the last of the run; asked again
        and again, as the answer may change on a resume.
      timeout_s: the longest wait for a checkpoint.
      validate: the means over the validation examples, or None if there are none.
      row: what else a line of the log has, by step.
      check: raises UsageError if the run, which may have begun after this process, has other
        settings.

    Returns:
      ({"validation": last means}, step).

    Raises:
      Stopped: it was asked to stop.
      RunError: no new checkpoint came in time.
    """
    request.watch_from(lambda: None)
    results: dict[str, dict[str, float]] = {}
    step, newest_at = -1, time.monotonic()
    workdir.path.mkdir(parents=True, exist_ok=True)
    log: RunLog | None = None
    with contextlib.ExitStack() as stack:
        while not is_over(step):
            if request.signal is not None:
                raise Stopped(f"by {request.signal.name}; evaluated up to step {step:,}")
            if time.monotonic() - newest_at > timeout_s:
                raise RunError(
                    f"no checkpoint after step {step:,} in {workdir.checkpoints} for"
                    f" {timeout_s:g} s; raise --stall_timeout_s if that is right"
                )
            newest = max(checkpoints.steps(), default=-1)
            if newest <= step or (restored := checkpoints.restore()) is None:
                time.sleep(_POLL_S)
                continue
            check()
            is_new = restored > step  # else the newest is damaged
            step, newest_at = max(newest, restored), time.monotonic()
            if is_new and (values := validate()) is not None:
                results["validation"] = values
                if log is None:
                    workdir.fetch(workdir.followed)
                    file = MetricsFile(workdir.followed, resumed_step=restored - 1)
                    stack.enter_context(contextlib.closing(file))
                    log = RunLog(file=file, console=Console())
                log.evaluation("validation", row(restored) | values)
            workdir.push(workdir.followed)
    return results, step
