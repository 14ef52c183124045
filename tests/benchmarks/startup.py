"""How long it takes from a command to its first training step.

    python tests/benchmarks/startup.py [--rounds=3]

Beside TensorFlow's own import, which is in all of them, measured in the same round. A first step is
over when its line is in the log. One table of medians over interleaved rounds.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from contenders import run

_TRAIN = (sys.executable, "-m", "dist_train")
_LAUNCH = (sys.executable, "-m", "launch")
COMMANDS: dict[str, tuple[str, ...]] = {
    "one device": _TRAIN,
    "mirrored, 2 devices": (*_TRAIN, "--strategy=mirrored", "--devices=2"),
    "2 workers": (*_LAUNCH, "--workers=2", "--", *_TRAIN, "--strategy=multi_worker"),
    "8 workers": (*_LAUNCH, "--workers=8", "--", *_TRAIN, "--strategy=multi_worker"),
}
_ROUNDS = 3
_GOAL_S = 1.5  # beyond the import, on one device


def import_s(scratch: Path) -> float:
    """Seconds from exec to exit of a Python that imports TensorFlow, and no more."""
    begin = time.perf_counter()
    run([sys.executable, "-c", "import os, tensorflow; os._exit(0)"], scratch)
    return time.perf_counter() - begin


def first_step_s(command: tuple[str, ...], scratch: Path) -> float:
    """Seconds from exec to the end of the first step."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        begin = time.time()
        run([*command, f"--workdir={folder}/run", "--epochs=1", "--log_steps=1"], scratch)
        with Path(folder, "run", "metrics.jsonl").open() as lines:
            row = json.loads(next(lines))
    if (row["kind"], row["step"]) != ("train", 1):
        raise subprocess.SubprocessError(f"no line of the first step, but {row}")
    return row["time"] - begin


def main() -> None:
    """Prints the table, as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=_ROUNDS, help=f"default: {_ROUNDS}")
    rounds = parser.parse_args().rounds
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    imports: list[float] = []
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for _ in range(rounds):
            imports.append(import_s(scratch))
            for name, command in COMMANDS.items():
                seconds[name].append(first_step_s(command, scratch))
                print(f"{name}: {seconds[name][-1]:.2f} s", file=sys.stderr, flush=True)
    print(f"{len(os.sched_getaffinity(0))} cores; `import tensorflow` alone: ", end="")
    print(f"{statistics.median(imports):.2f} s\n")
    print("| from exec to the first step | s | beyond the import | goal |\n|---|---|---|---|")
    for name, found in seconds.items():
        beyond = statistics.median(
            whole - alone for whole, alone in zip(found, imports, strict=True)
        )
        goal = f"≤ {_GOAL_S:g}" if name == "one device" else ""
        print(f"| {name} | {statistics.median(found):.2f} | {beyond:.2f} | {goal} |")


if __name__ == "__main__":
    main()
