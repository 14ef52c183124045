"""Whether a training step has become slower than it was, on whatever machine this is.

    python tests/benchmarks/baseline.py [--update]

Steps per second say more about the machine than about us, so what is compared is a ratio: our step
beside its own matrix products, by turns in one process, each at its best of several short turns.
The process has one core, so that neighbours take as much from the one as from the other.
baseline.json holds the ratios that --update wrote. Below 0.4 of one, twice in a row, is a failure:
processors make less of a difference.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from workload import Workload

ROOT = Path(__file__).parents[2]
BASELINE = Path(__file__).with_name("baseline.json")
BAND = 0.4
# What is measured: settings of a Config.
CASES: dict[str, dict] = {
    "default": {},
    "mirrored, 2 devices": {"strategy": "mirrored", "devices": 2},
    "stream": {"input": "stream"},
}
_TURNS = 8
# Ours is the longer one: what a stream has read ahead in the other's turn must not count for much.
_TURN_S = {"step": 0.6, "products": 0.15}
_TIMEOUT_S = 120.0


def measure(name: str) -> dict[str, float]:
    """Steps per second of one case, in this process, which has not imported TensorFlow yet.

    Returns:
      {"step": our steps per second, "products": of the products alone}, each at its best.
    """
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    from floor import Products

    import dist_train
    from dist_train import replicas
    from dist_train.build import Parts
    from dist_train.mnist import task
    from dist_train.workers import Workers

    config = dist_train.Config(**CASES[name])
    strategy = replicas.create(config.strategy, config.devices, None)
    parts = Parts(task(config), config, strategy, Workers(strategy, None, stall_timeout_s=60.0))
    train = parts.inputs["train"]
    chunks, number = train.chunks(0), 0

    def steps() -> int:
        """One chunk, which is an epoch where the examples are resident."""
        nonlocal number
        start = number * train.schedule.chunk_steps
        _, begin, left = train.schedule.locate(start % train.schedule.steps_per_epoch)
        number = (number + 1) % train.schedule.chunks_per_epoch
        lines = parts.train_loop(train.data, next(chunks), begin, begin + left)
        return sum(line.steps for line in lines)

    products = Products(Workload(batch=config.batch_size))

    def hundred() -> int:
        for _ in range(100):
            products()
        return 100

    steps()  # traces and compiles
    best = {"step": 0.0, "products": 0.0}
    for _ in range(_TURNS):
        for key, work in (("step", steps), ("products", hundred)):
            best[key] = max(best[key], rate(work, _TURN_S[key]))
    return best


def read() -> dict[str, float]:
    """The ratios that --update wrote, by case."""
    return json.loads(BASELINE.read_text())


def rate(work: Callable[[], int], seconds: float) -> float:
    """How much `work` does per second, called until so many seconds are over."""
    begin, done = time.perf_counter(), 0
    while (passed := time.perf_counter() - begin) < seconds:
        done += work()
    return done / passed


def run(name: str) -> dict[str, float]:
    """`measure` in a process of its own."""
    environment = {key: v for key, v in os.environ.items() if not key.startswith("OPENBLAS_")} | {
        "OPENBLAS_NUM_THREADS": "1",  # it would start as many as the machine has cores
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, __file__, f"--measure={name}"],
        env=environment,
        capture_output=True,  # TensorFlow's import says that there is no GPU
        text=True,
        timeout=_TIMEOUT_S,
    )
    if done.returncode:
        sys.exit(f"{name}: exit status {done.returncode}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def check(
    stored: Mapping[str, float], run: Callable[[str], dict[str, float]], say: Callable[[str], None]
) -> tuple[dict[str, float], list[str]]:
    """Measures all cases, and those again that are too slow.

    Args:
      stored: the ratio of each case; one that has none cannot fail.
      run: measures a case.
      say: takes the lines of the table.

    Returns:
      The ratios, and the cases that are too slow.
    """
    say("| step | steps/s | products alone | ratio | baseline |")
    say("|---|---|---|---|---|")
    ratios, slow = {}, []
    for name in CASES:
        before = stored.get(name, 0.0)
        for _ in range(2):
            best = run(name)
            ratio = best["step"] / best["products"]
            say(
                f"| {name} | {best['step']:,.0f} | {best['products']:,.0f} | {ratio:.3f}"
                f" | {before:.3f} |"
            )
            ratios[name] = max(ratio, ratios.get(name, 0.0))
            if ratio >= BAND * before:
                break
        else:
            slow.append(name)
    return ratios, slow


def main() -> int:
    """Prints the table; 1 if a case is too slow."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write what is measured")
    parser.add_argument("--measure", choices=CASES, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.measure:
        print(json.dumps(measure(chosen.measure)))
        return 0
    stored = {} if chosen.update else read()
    ratios, slow = check(stored, run, lambda line: print(line, flush=True))
    if chosen.update:
        rounded = {name: round(ratio, 3) for name, ratio in ratios.items()}
        BASELINE.write_text(json.dumps(rounded, indent=2) + "\n")
    for name in slow:
        print(
            f"{name}: less than {BAND:g} of the baseline, twice; if that is meant, run"
            " tests/benchmarks/baseline.py --update"
        )
    return int(bool(slow))


if __name__ == "__main__":
    sys.exit(main())
