"""The table of recipes in the README: accuracy over three seeds, and time.

    python tests/benchmarks/recipes.py

It needs Fashion-MNIST where Debian's package dataset-fashion-mnist puts it; --only=guide,mlp,cnn
does without.

Each run is the whole command, from its start to its exit. CPU seconds tell what a busy machine
hides: divided by the number of cores they are the least that it takes on a quiet one.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECIPES = ("guide", "mlp", "cnn", "fashion")


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(RECIPES), help="default: all")
    parser.add_argument("--seeds", default="0,1,2", help="default: 0,1,2")
    return parser.parse_args()


def measure(recipe: str, seed: int) -> tuple[float, float, float]:
    """(test accuracy, seconds, CPU seconds) of one run."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "dist_train", f"--recipe={recipe}"]
        command += [f"--seed={seed}", f"--workdir={scratch}/run"]
        cpu, begin = cpu_seconds(), time.monotonic()
        subprocess.run(
            command,
            cwd=scratch,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.DEVNULL,
            check=True,
        )
        seconds, cpu = time.monotonic() - begin, cpu_seconds() - cpu
        lines = Path(scratch, "run", "metrics.jsonl").read_text().splitlines()
    [test] = (row for row in map(json.loads, lines) if row["kind"] == "test")
    return test["accuracy"], seconds, cpu


def cpu_seconds() -> float:
    """Of all children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Prints the table, as Markdown, a row as soon as it is known."""
    chosen = options()
    print("| command | test accuracy: each seed, mean | time | CPU time |")
    print("|---|---|---|---|", flush=True)
    for name in chosen.only.split(","):
        runs = [measure(name, int(seed)) for seed in chosen.seeds.split(",")]
        accuracies, seconds, cpu = zip(*runs, strict=True)
        each = " · ".join(f"{100 * accuracy:.2f}" for accuracy in accuracies)
        print(
            f"| `dist-train --recipe={name}` | {each}, {100 * statistics.mean(accuracies):.2f} %"
            f" | {statistics.median(seconds):.0f} s | {statistics.median(cpu):.0f} s |",
            flush=True,
        )


if __name__ == "__main__":
    main()
