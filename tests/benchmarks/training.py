"""How fast training is, beside its peers, in one sitting on this machine.

    pip install -e '.[bench]' && python tests/benchmarks/training.py

What is measured is in workload.py, who takes part in contenders.py. The rounds are interleaved:
each runs every contender once, as a process of its own, and the table has the medians over the
rounds. Ratios are taken within a round. It takes about two minutes a round.
"""

import argparse
import json
import math
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from contenders import CONTENDERS, Contender, Figure, run

_VERSIONS = ("tensorflow", "keras", "torch", "jax", "numpy")
# A model that knows nothing has the loss ln 10; one epoch brings it to about 2.05.
_LEARNED = 0.96 * math.log(10)

Results = dict[str, list[Figure | None]]  # by contender, one for each round; None: it failed


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [contender.name for contender in CONTENDERS]
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--only", default="", help="of: " + ",".join(names) + "; default: all")
    parser.add_argument(
        "--python",
        default=sys.executable,
        help="interpreter for the peers that need no TensorFlow; default: this one",
    )
    chosen = parser.parse_args()
    chosen.only = chosen.only.split(",") if chosen.only else names
    if unknown := set(chosen.only) - set(names):
        parser.error(f"--only: {', '.join(sorted(unknown))}: not one of {', '.join(names)}")
    if chosen.rounds < 1:
        parser.error(f"--rounds={chosen.rounds}: at least 1")
    return chosen


def write_data(scratch: Path) -> None:
    """mnist.npz for the peers, all 60,000 pictures: x uint8 [n, 28, 28], y uint8 [n]."""
    # In a process of its own: this one's path is the folder of this script.
    code = (
        "import sys, numpy; from dist_train.mnist import files; (x, y), _ = files.read(None);"
        " numpy.savez(sys.argv[1], x=x, y=y)"
    )
    run([sys.executable, "-c", code, str(scratch / "mnist.npz")], scratch)


def installed_versions(python: str, scratch: Path) -> dict[str, str]:
    """{package: version} of what an interpreter has of `_VERSIONS`."""
    code = """
import importlib.metadata, json, sys
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""
    return json.loads(run([python, "-c", code, *_VERSIONS], scratch))


def measure(
    contenders: list[Contender], pythons: dict[str, str], rounds: int, scratch: Path
) -> Results:
    """Runs all, round by round."""
    results: Results = {contender.name: [] for contender in contenders}
    for number in range(rounds):
        for contender in contenders:
            figure, begin = None, time.monotonic()
            try:
                figure = contender.measure(pythons[contender.module], scratch)
                text = f"{figure.value:,.1f}  loss {figure.loss:.4f}"
            except subprocess.SubprocessError as error:
                text = f"failed: {error}"
            results[contender.name].append(figure)
            text += f"  ({time.monotonic() - begin:.0f} s)"
            print(f"round {number + 1}  {contender.name}: {text}", file=sys.stderr, flush=True)
    return results


def row(contender: Contender, results: Results) -> list[str]:
    """A line of the table: label, figure, ratio, goal, loss."""
    figures = [figure for figure in results[contender.name] if figure is not None]
    goal = f"{contender.goal:g}" if contender.goal else ""
    if not figures:
        return [contender.label, "failed", "", goal and f"≥ {goal} ×", ""]
    value = statistics.median(figure.value for figure in figures)
    loss = statistics.median(figure.loss for figure in figures)
    learned = f"{loss:.3f}" if loss < _LEARNED else f"{loss:.3f}: **does not learn**"
    if contender.name == "command":
        return [contender.label, f"{value:.2f} s", "", f"< {goal} s", learned]
    ratios = [
        ours.value / theirs.value
        for ours, theirs in zip(
            results.get(contender.rival or "", []), results[contender.name], strict=False
        )
        if ours is not None and theirs is not None
    ]
    ratio = f"{statistics.median(ratios):.2f} ×" if ratios else ""
    return [contender.label, f"{value:,.0f}", ratio, goal and f"≥ {goal} ×", learned]


def hardware(versions: dict[str, str]) -> str:
    """One line on the machine and the software."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    cpu = found[1] if found else platform.machine()
    cores = len(os.sched_getaffinity(0))
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{cpu}, {cores} cores; Python {platform.python_version()}, {packages}"


def main() -> int:
    """Prints the table, as Markdown; 1 if a contender failed or did not learn."""
    chosen = options()
    # So that what runs is stopped on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    rivals = {contender.rival for contender in CONTENDERS if contender.name in chosen.only}
    wanted = [c for c in CONTENDERS if c.name in chosen.only or c.name in rivals]
    pythons = {"tensorflow": sys.executable, "torch": chosen.python, "jax": chosen.python}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        have = {python: installed_versions(python, scratch) for python in pythons.values()}
        there = [c for c in wanted if c.module in have[pythons[c.module]]]
        write_data(scratch)
        results = measure(there, pythons, chosen.rounds, scratch)

    versions = {**have[chosen.python], **have[sys.executable]}
    print(hardware(versions) + f"; medians of {chosen.rounds} interleaved rounds\n")
    print("| loop | steps/s | dist_train is | goal | loss after an epoch |")
    print("|---|---|---|---|---|")
    for contender in wanted:
        if contender.name in results:
            cells = row(contender, results)
        else:
            cells = [contender.label, f"{contender.module} is not installed", "", "", ""]
        print("| " + " | ".join(cells) + " |")
    figures = [figure for row in results.values() for figure in row]
    return int(any(figure is None or figure.loss >= _LEARNED for figure in figures))


if __name__ == "__main__":
    sys.exit(main())
