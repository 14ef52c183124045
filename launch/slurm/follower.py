"""Follows a job: shows its states and what its workers write, cancels or leaves it on request."""

import contextlib
import os
import select
import signal
import time
from collections.abc import Mapping

from launch.output import Output
from launch.report import STOPPED
from launch.slurm import client
from launch.stop import StopRequests

_TICK_S = 0.5
# Between questions to the controller, which serves others too.
_ASK_S = 2.0
# A job that requeues itself is FAILED for a moment, until its nodes are free of it.
_SURE_S = 10.0
# A controller that is away for longer is not waited for.
_SILENCE_S = 600.0
# Slurm kills what does not end on scancel after KillWait, 30 s by default.
_CANCEL_S = 300.0
# The last lines may reach us late through a network file system.
_LAST_LINES_S = 1.0
_READ_BYTES = 1 << 16


class _Tail:
    """What is appended to a file, which need not exist yet, as a pipe's content."""

    def __init__(self, path: str, name: str, output: Output, *, target: int, from_start: bool):
        self._path = path
        self._offset = 0
        if not from_start:
            with contextlib.suppress(OSError):
                self._offset = os.path.getsize(path)
        source, self._pipe = os.pipe()
        os.set_blocking(self._pipe, False)
        output.add(name, {source: target})

    def pump(self) -> bool:
        """Passes on what is new; whether there was something."""
        moved = False
        with contextlib.suppress(OSError), open(self._path, "rb") as file:
            if os.path.getsize(self._path) < self._offset:  # somebody has emptied it
                self._offset = 0
            file.seek(self._offset)
            while data := file.read(_READ_BYTES):
                written = os.write(self._pipe, data)  # what does not fit waits in the file
                self._offset += written
                moved = True
                if written < len(data):
                    break
        return moved

    def close(self) -> None:
        os.close(self._pipe)


class Follower:
    """Follows one job; use it once: `Follower(...).run(script)`.

    Args:
        logs: name, such as `worker 1`, -> file that this worker appends to.
        output: not started yet.
    """

    def __init__(self, logs: Mapping[str, str], output: Output):
        self._output = output
        self._tails = [
            _Tail(path, name, output, target=1, from_start=False) for name, path in logs.items()
        ]
        self._has_job_log = False
        self._requests = StopRequests()
        self._cancelled_at: float | None = None
        self._answered_at = time.monotonic()
        self._shown = ""

    def run(self, script: str) -> int:
        """Submits the script and returns the exit status for the launcher when the job has ended.

        SIGINT and SIGTERM cancel the job. Other requests to stop, such as the terminal's end, are
        for the launcher alone, which returns 128 + n: the 75 of a stopped run would invite to
        start another one beside it.

        Raises:
            CommandNotFound: there is no Slurm here.
        """
        self._output.start()
        try:
            job = client.submit(script)
            self._output.say(f"job {job} is submitted; Ctrl-C cancels it")
            return self._follow(job)
        except client.Refused as error:
            self._output.say(str(error))
            return 1
        finally:
            for tail in self._tails:
                tail.close()
            self._output.drain()

    def _follow(self, job: str) -> int:
        ask_at = 0.0
        ended_at: float | None = None
        while True:
            select.select([self._requests], [], [], _TICK_S)
            if requests := self._requests.take():
                if self._cancelled_at is not None:
                    self._output.say(f"job {job} is left to Slurm, which is cancelling it")
                    return STOPPED
                if not {signal.SIGINT, signal.SIGTERM} & set(requests):
                    name = signal.Signals(requests[0]).name
                    self._output.say(f"{name}: job {job} goes on; scancel {job} ends it")
                    return 128 + requests[0]
                self._output.say(f"job {job} is being cancelled; Ctrl-C again leaves it to Slurm")
                self._cancelled_at = time.monotonic()
                client.cancel(job)
                ask_at = 0.0
            self._pump()
            now = time.monotonic()
            if now < ask_at:
                continue
            ask_at = now + _ASK_S
            state = self._ask(job, now)
            if state is not None and not state.has_ended:
                ended_at = None
            elif state is not None:
                ended_at = ended_at or now
                is_final = state.name == "COMPLETED" or self._cancelled_at is not None
                if is_final or now - ended_at >= _SURE_S:
                    return self._end(state)
            if self._cancelled_at is not None and now - self._cancelled_at > _CANCEL_S:
                self._output.say(
                    f"job {job} has not ended {_CANCEL_S:g} s after scancel: squeue --jobs={job}"
                )
                return 1

    def _pump(self) -> bool:
        moved = [tail.pump() for tail in self._tails]
        return any(moved)

    def _ask(self, job: str, now: float) -> client.State | None:
        """The job's state, which is shown when it is another one; None: no answer this time."""
        try:
            state = client.show(job)
        except client.Refused as error:
            if now - self._answered_at > _SILENCE_S or "Invalid job id" in str(error):
                raise
            return None
        self._answered_at = now
        if not self._has_job_log and state.output:
            self._has_job_log = True
            name = f"job {job}"
            tail = _Tail(state.output, name, self._output, target=2, from_start=True)
            self._tails.append(tail)
        shown = f"job {job} is {state.name}"
        if state.reason not in ("", "None"):
            shown += f" ({state.reason})"
        if state.restarts:
            shown += f", restart {state.restarts}"
        if shown != self._shown:
            self._output.say(shown)
        self._shown = shown
        return state

    def _end(self, state: client.State) -> int:
        quiet_from = time.monotonic()
        while time.monotonic() - quiet_from < _LAST_LINES_S:
            if self._pump():
                quiet_from = time.monotonic()
            time.sleep(0.1)
        if self._cancelled_at is not None and state.name == "CANCELLED":
            return STOPPED
        return state.exit_status
