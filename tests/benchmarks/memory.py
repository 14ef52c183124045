"""How much memory a training process takes, and whether that grows.

    python tests/benchmarks/memory.py

Peak: the most resident memory that each process had (VmHWM), and the most of it that is its own
(RssAnon: not the pages of libraries, which processes share). Growth: RssAnon after 10,000 and after
100,000 steps of one run with its logs, validations and checkpoints.
"""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
_TRAIN = (sys.executable, "-m", "dist_train")
_LAUNCH = (sys.executable, "-m", "launch", "--workers=2", "--")
COMMANDS = {
    "default": _TRAIN,
    "`--input=stream`": (*_TRAIN, "--input=stream"),
    "mirrored, 2 devices": (*_TRAIN, "--strategy=mirrored", "--devices=2"),
    "2 workers, each": (*_LAUNCH, *_TRAIN, "--strategy=multi_worker"),
}
_LONG_EPOCHS = 128  # of 782 steps: 100,096
_MARKS = (10_000, 100_000)
_PERIOD_S = 0.05
_TIMEOUT_S = 240.0


@dataclasses.dataclass(frozen=True)
class Sample:
    """One look at a process that trains.

    Attributes:
      pid: of the process.
      peak, own: VmHWM and RssAnon, MiB.
      step: that the log has reached; 0: none yet.
    """

    pid: int
    peak: float
    own: float
    step: int


def watch(command: tuple[str, ...], *flags: str) -> Iterator[Sample]:
    """Runs a command, and yields what its training processes take until it is over.

    Raises:
      subprocess.SubprocessError: it failed, or took too long.
    """
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [*command, f"--workdir={folder}/run", *flags],
            cwd=ROOT,
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        end = time.monotonic() + _TIMEOUT_S
        try:
            while process.poll() is None:
                step = _last_step(Path(folder, "run", "metrics.jsonl"))
                for pid in _family(process.pid):
                    if (sizes := _sizes(pid)) is not None:
                        yield Sample(pid, *sizes, step)
                if time.monotonic() > end:
                    raise subprocess.TimeoutExpired(command, _TIMEOUT_S)
                time.sleep(_PERIOD_S)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait()
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)


def _family(pid: int) -> list[int]:
    """A process and all that it has started, directly or not."""
    try:
        listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [pid, *(member for child in listed for member in _family(int(child)))]


def _sizes(pid: int) -> tuple[float, float] | None:
    """(VmHWM, RssAnon) in MiB; None if it is gone, or is not one that trains."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    if words[1:3] != [b"-m", b"dist_train"]:
        return None
    found = [re.search(rf"^{name}:\s+(\d+) kB", status, re.M) for name in ("VmHWM", "RssAnon")]
    if not all(found):  # a zombie has no memory
        return None
    peak, own = (int(match[1]) / 1024 for match in found if match)
    return peak, own


def _last_step(path: Path) -> int:
    """The step of the last whole line of a metrics.jsonl; 0: none yet."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            lines = file.read().split(b"\n")
        return json.loads(lines[-2])["step"]
    except (FileNotFoundError, IndexError, json.JSONDecodeError):
        return 0


def main() -> None:
    """Prints the table, as Markdown."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    print("| memory of a process | peak, MiB | of its own, MiB |\n|---|---|---|")
    for name, command in COMMANDS.items():
        peaks: dict[int, tuple[float, float]] = {}
        for sample in watch(command):
            peak, own = peaks.get(sample.pid, (0.0, 0.0))
            peaks[sample.pid] = max(peak, sample.peak), max(own, sample.own)
        for peak, own in peaks.values():
            print(f"| {name} | {peak:,.0f} | {own:,.0f} |", flush=True)
    reached = {}
    for sample in watch(_TRAIN, f"--epochs={_LONG_EPOCHS}"):
        for mark in _MARKS:
            if sample.step >= mark and mark not in reached:
                reached[mark] = sample.own
    for mark, own in reached.items():
        print(f"| default, after {mark:,} steps | | {own:,.0f} |")


if __name__ == "__main__":
    main()
