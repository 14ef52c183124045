"""Slurm's own commands: each is run to its end, within a bound."""

import re
import subprocess
from dataclasses import dataclass

from launch.errors import CommandNotFound

_TIMEOUT_S = 60.0
_ENDED = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"),
    *("PREEMPTED", "REVOKED", "SPECIAL_EXIT", "TIMEOUT"),
)


class Refused(Exception):
    """Slurm said no, or nothing; the text is its own."""


@dataclass(frozen=True)
class State:
    """What the controller says of a job.

    Attributes:
        name: such as PENDING or RUNNING.
        reason: why it is pending or has failed, in Slurm's words; `None`: no reason.
        restarts: how often it was requeued.
        code: exit status of the script.
        signal: that killed the script; 0: none did.
        output: the file with the script's output.
    """

    name: str
    reason: str
    restarts: int
    code: int
    signal: int
    output: str

    @property
    def has_ended(self) -> bool:
        """Whether it will not run again."""
        return self.name in _ENDED

    @property
    def exit_status(self) -> int:
        """The same as the exit status of a shell; never 0 if it was not completed."""
        status = 128 + self.signal if self.signal else self.code
        return status or (0 if self.name == "COMPLETED" else 1)


def submit(script: str) -> str:
    """Submits a batch script and returns the job's id.

    Raises:
        CommandNotFound: there is no sbatch here.
        Refused: Slurm does not take it.
    """
    # "17", or "17;cluster".
    return _run(["sbatch", "--parsable"], script).strip().partition(";")[0]


def cancel(job: str) -> None:
    """Cancels a job, as scancel does."""
    _run(["scancel", job])


def show(job: str) -> State:
    """What the controller says of a job that is not gone for more than minutes.

    Raises:
        Refused: it does not know the job any more, or does not answer.
    """
    text = _run(["scontrol", "show", "job", job])

    def field(pattern: str) -> str:
        match = re.search(pattern, text, re.MULTILINE)
        return match[1] if match else ""

    code, _, signal = field(r"\bExitCode=(\d+:\d+)").partition(":")
    return State(
        name=field(r"^\s*JobState=(\w+)"),
        reason=field(r"\bReason=(\S+)"),
        restarts=int(field(r"\bRestarts=(\d+)") or 0),
        code=int(code or 0),
        signal=int(signal or 0),
        output=field(r"^\s*StdOut=(.*)$"),
    )


def _run(command: list[str], text: str = "") -> str:
    try:
        ended = subprocess.run(
            command,
            input=text,
            capture_output=True,
            text=True,
            errors="surrogateescape",
            timeout=_TIMEOUT_S,
            start_new_session=True,  # Ctrl-C is for us: half a submission helps nobody
        )
    except FileNotFoundError:
        raise CommandNotFound(
            f"command not found: {command[0]}; start this on a machine from where jobs can be"
            " submitted, or use --dry_run"
        ) from None
    except subprocess.TimeoutExpired:
        raise Refused(f"{command[0]} has not answered within {_TIMEOUT_S:g} s") from None
    if ended.returncode:
        raise Refused(f"{command[0]}: {ended.stderr.strip() or ended.returncode}")
    return ended.stdout
