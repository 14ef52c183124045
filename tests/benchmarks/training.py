"""How fast training is, beside its peers, in one sitting on this machine.

    pip install -e '.[bench]' && python tests/benchmarks/training.py

What is measured is in workload.py, who takes part in contenders.py. The rounds are interleaved:
each runs every contender once, as a process of its own, and the table has the medians over the
rounds. Ratios are taken within a round. Without flags it measures what the README shows, which
takes about ten minutes; --model, --batch or --optimizer choose one workload.
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
from typing import TYPE_CHECKING

from contenders import CONTENDERS, Contender, Figure, data_file, run
from workload import CLASSES, Workload

if TYPE_CHECKING:
    from picture import Bar

_VERSIONS = ("tensorflow", "keras", "torch", "jax", "numpy")
# Workloads and rounds of the README.
_SITTING = (
    (Workload(), 3),
    (Workload(batch=1024), 1),
    (Workload(model="cnn", optimizer="adam"), 1),
)
# A model that knows nothing has this loss; one epoch must bring it down.
_LEARNED = 0.96 * math.log(CLASSES)

Results = dict[str, list[Figure | None]]  # by contender, one for each round; None: it failed


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [contender.name for contender in CONTENDERS]
    parser.add_argument("--rounds", type=int, help="default: 3 of the usual workload, 1 of others")
    parser.add_argument("--only", default="", help="of: " + ",".join(names) + "; default: all")
    parser.add_argument("--model", choices=("mlp", "cnn"), help="default: mlp")
    parser.add_argument("--batch", type=int, choices=(64, 1024), help="default: 64")
    parser.add_argument("--optimizer", choices=("sgd", "adam"), help="default: sgd")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draws the tables too")
    parser.add_argument(
        "--python",
        default=sys.executable,
        help="interpreter for the peers that need no TensorFlow; default: this one",
    )
    chosen = parser.parse_args()
    chosen.only = chosen.only.split(",") if chosen.only else names
    if unknown := set(chosen.only) - set(names):
        parser.error(f"--only: {', '.join(sorted(unknown))}: not one of {', '.join(names)}")
    if chosen.rounds is not None and chosen.rounds < 1:
        parser.error(f"--rounds={chosen.rounds}: at least 1")
    given = {
        name: value
        for name in ("model", "batch", "optimizer")
        if (value := getattr(chosen, name)) is not None
    }
    sitting = ((Workload(**given), 3),) if given else _SITTING
    chosen.sitting = [(work, chosen.rounds or rounds) for work, rounds in sitting]
    return chosen


def write_data(work: Workload, scratch: Path) -> None:
    """See `data_file`."""
    code = """
import sys, numpy
from dist_train.mnist import files
(x, y), (x_test, y_test) = files.read(None)
count = int(sys.argv[2])
numpy.savez(
    sys.argv[1], x_train=x[:count], y_train=y[:count], x_test=x_test[:100], y_test=y_test[:100]
)
"""
    # In a process of its own: this one's path is the folder of this script.
    path, count = data_file(work, scratch), work.examples + work.held
    run([sys.executable, "-c", code, str(path), str(count)], scratch)


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


def blas(scratch: Path) -> str:
    """The kernels and threads of numpy's products, if threadpoolctl is there to tell."""
    code = """
try:
    import numpy, threadpoolctl
except ImportError:
    pass
else:
    for pool in threadpoolctl.threadpool_info():
        if pool["user_api"] == "blas":
            print(pool["internal_api"], pool["architecture"], pool["num_threads"], "threads")
"""
    return run([sys.executable, "-c", code], scratch).strip()


def measure(
    contenders: list[Contender],
    pythons: dict[str, str],
    work: Workload,
    rounds: int,
    scratch: Path,
) -> Results:
    """Runs all, round by round."""
    results: Results = {contender.name: [] for contender in contenders}
    for number in range(rounds):
        for contender in contenders:
            figure, begin = None, time.monotonic()
            try:
                figure = contender.measure(pythons[contender.module], work, scratch)
                text = f"{figure.value:,.1f}"
                if figure.loss is not None:
                    text += f"  loss {figure.loss:.4f}"
            except subprocess.SubprocessError as error:
                text = f"failed: {error}"
            results[contender.name].append(figure)
            text += f"  ({time.monotonic() - begin:.0f} s)"
            where = f"{work.name}, round {number + 1}  {contender.name}"
            print(f"{where}: {text}", file=sys.stderr, flush=True)
    return results


def ratio(contender: Contender, results: Results) -> float | None:
    """How many times as fast ours is as a peer, or as one of ours is as the first of ours."""
    ratios = [
        theirs.value / ours.value if contender.ours else ours.value / theirs.value
        for ours, theirs in zip(
            results.get(contender.rival or "", []), results[contender.name], strict=False
        )
        if ours is not None and theirs is not None
    ]
    return statistics.median(ratios) if ratios else None


def row(contender: Contender, work: Workload, results: Results) -> list[str]:
    """A line of the table: label, figure, ratio, goal, loss."""
    figures = [figure for figure in results[contender.name] if figure is not None]
    goal = contender.goal_at(work)
    aim = f"≥ {goal:g} ×" if goal else ""
    if not figures:
        return [contender.label, "failed", "", aim, ""]
    value = statistics.median(figure.value for figure in figures)
    losses = [figure.loss for figure in figures if figure.loss is not None]
    loss = statistics.median(losses) if losses else None
    learned = "" if loss is None else f"{loss:.3f}"
    if loss is not None and loss >= _LEARNED:
        learned += ": **does not learn**"
    if not contender.epochs:
        return [contender.label, f"{value:.2f} s", "", f"≤ {goal:g} s", learned]
    times = ratio(contender, results)
    shown = "" if times is None else f"{times:.2f} ×"
    if shown and contender.ours:
        shown += f" {contender.rival}"
    return [contender.label, f"{value:,.0f}", shown, aim, learned]


def bars(contenders: list[Contender], work: Workload, results: Results) -> "list[Bar]":
    """The lines of the table that have steps per second, for the picture."""
    from picture import Bar  # late: the tables do without matplotlib

    found = []
    for contender in contenders:
        figures = [f.value for f in results.get(contender.name, []) if f is not None]
        if figures and contender.epochs:
            found.append(
                Bar(
                    label=re.sub("[*`]", "", contender.label),
                    value=statistics.median(figures),
                    times=ratio(contender, results),
                    goal=contender.goal_at(work),
                    ours=contender.ours,
                )
            )
    return found


def chart(contenders: list[Contender], work: Workload, results: Results) -> str:
    """The loops of one process that train, as bars in Mermaid, which a README can hold."""
    rates = {}
    for contender in contenders:
        figures = [f for f in results.get(contender.name, []) if f is not None]
        shown = contender.name == "dist_train" or (contender.rival, contender.ours) == (
            "dist_train",
            False,
        )
        if shown and figures and figures[0].loss is not None:
            label = re.sub("[*`,]|_compile=True", "", contender.label).partition(":")[0]
            rates[label] = statistics.median(figure.value for figure in figures)
    ordered = sorted(rates, key=lambda label: -rates[label])
    return "\n".join(
        [
            "```mermaid",
            "xychart-beta horizontal",
            f'    title "steps/s: {work.name}"',
            f"    x-axis [{', '.join(chr(34) + label + chr(34) for label in ordered)}]",
            f"    bar [{', '.join(f'{rates[label]:.0f}' for label in ordered)}]",
            "```",
        ]
    )


def hardware(versions: dict[str, str], kernels: str) -> str:
    """One line on the machine and the software."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    cpu = found[1] if found else platform.machine()
    cores = len(os.sched_getaffinity(0))
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    packages += f" ({kernels})" if kernels else ""
    return f"{cpu}, {cores} cores; Python {platform.python_version()}, {packages}"


def main() -> int:
    """Prints the tables, as Markdown; 1 if a contender failed or did not learn."""
    chosen = options()
    # So that what runs is stopped on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    rivals = {contender.rival for contender in CONTENDERS if contender.name in chosen.only}
    wanted = [c for c in CONTENDERS if c.name in chosen.only or c.name in rivals]
    pythons = {"tensorflow": sys.executable, "torch": chosen.python, "jax": chosen.python}
    tables: dict[Workload, Results] = {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        have = {python: installed_versions(python, scratch) for python in pythons.values()}
        kernels = blas(scratch)
        for work, rounds in chosen.sitting:
            write_data(work, scratch)
            there = [c for c in wanted if c.takes(work) and c.module in have[pythons[c.module]]]
            tables[work] = measure(there, pythons, work, rounds, scratch)

    print(hardware({**have[chosen.python], **have[sys.executable]}, kernels))
    for work, rounds in chosen.sitting:
        print(f"\n{work.name}; medians of {rounds} interleaved rounds\n")
        print("| loop | steps/s | dist_train is | goal | loss after an epoch |")
        print("|---|---|---|---|---|")
        for contender in wanted:
            if contender.name in tables[work]:
                cells = row(contender, work, tables[work])
            elif contender.takes(work):
                cells = [contender.label, f"{contender.module} is not installed", "", "", ""]
            else:
                continue
            print("| " + " | ".join(cells) + " |")
        print(f"\n{chart(wanted, work, tables[work])}")
    if chosen.picture:
        from picture import draw

        panels = {work.name: bars(wanted, work, results) for work, results in tables.items()}
        draw(panels, chosen.picture)
    figures = [f for results in tables.values() for row in results.values() for f in row]
    return int(any(f is None or (f.loss is not None and f.loss >= _LEARNED) for f in figures))


if __name__ == "__main__":
    sys.exit(main())
