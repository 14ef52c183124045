"""What a training step consists of: compute, reduction, update, by the number of replicas.

    python tests/benchmarks/breakdown.py

The default model, and one of 10 million weights, at the default batch. In each process three steps
take turns: the whole one; one that leaves out the reduction; one that leaves out the update as
well. A part is the difference between two medians. All replicas share the machine's cores, so with
more of them each has less of a core.
"""

import argparse
import json
import os
import re
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
from contenders import ROOT, run

_COUNTS = (2, 4, 8)
_TURNS = 7
_TURN_STEPS = {"default": 391, "large": 10}
_LEAVE_S = 2.0  # in which the last worker gets what it needs of the others


@contextmanager
def without(*, reduction: bool, update: bool) -> Iterator[None]:
    """A training step that is built in the body leaves these out."""
    from dist_train import step

    with ExitStack() as patched:
        if reduction:
            patched.enter_context(mock.patch.object(step.reduction, "make", return_value=list))
            # Replicas that do not exchange anything differ.
            patched.enter_context(mock.patch.object(step, "agree", return_value=True))
        if update:
            patched.enter_context(mock.patch.object(step.TrainLoop, "_apply", return_value=None))
        yield


def large(config):
    """A task whose model has 10 million weights, in eight layers."""
    import keras

    import dist_train

    def model():
        layers = [keras.layers.Dense(1150, activation="relu") for _ in range(8)]
        return keras.Sequential([keras.Input((256,)), *layers, keras.layers.Dense(10)])

    rng, count = np.random.default_rng(0), config.batch_size * _TURN_STEPS["large"]
    return dist_train.Task(
        model=model,
        train=dist_train.Arrays(
            rng.standard_normal((count, 256), np.float32), rng.integers(0, 10, count, np.int32)
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )


def measure(strategy_name: str, devices: int, size: str) -> dict[str, float]:
    """Seconds of a step by its parts, in this process, which has not imported TensorFlow yet."""
    import dist_train
    from dist_train import environments, mnist, replicas
    from dist_train.build import Parts
    from dist_train.workers import Workers

    task, steps = large if size == "large" else mnist.task, _TURN_STEPS[size]
    config = dist_train.Config(strategy=strategy_name, devices=devices)
    cluster = environments.find_cluster(os.environ, strategy_name, config.start_timeout_s)
    strategy = replicas.create(strategy_name, devices, cluster)
    workers = Workers(strategy, cluster, stall_timeout_s=60.0)
    # The whole step comes last: in it the workers wait for each other.
    kinds = {
        "compute": {"reduction": True, "update": True},
        "without the reduction": {"reduction": True, "update": False},
        "whole": {"reduction": False, "update": False},
    }
    loops = {}
    for kind, left_out in kinds.items():
        with without(**left_out):
            parts = Parts(task(config), config, strategy, workers)
            train = parts.inputs["train"]
            chunk = next(train.chunks(0))
            loops[kind] = parts.train_loop, train.data, chunk
            parts.train_loop(train.data, chunk, 0, 2)  # traces and compiles
    times: dict[str, list[float]] = {kind: [] for kind in loops}
    for _ in range(_TURNS):
        for kind, (loop, data, chunk) in loops.items():
            begin = time.perf_counter()
            done = sum(line.steps for line in loop(data, chunk, 0, steps))
            if done != steps:
                raise AssertionError(f"{kind}: {done} steps of {steps}")
            times[kind].append((time.perf_counter() - begin) / done)
    found = {kind: statistics.median(each) for kind, each in times.items()}
    return {
        "step": found["whole"],
        "compute": found["compute"],
        "update": found["without the reduction"] - found["compute"],
        "reduction": found["whole"] - found["without the reduction"],
    }


def main() -> None:
    """Prints the table, as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.measure:
        from dist_train import allocator

        strategy, devices, size = chosen.measure
        with allocator.keeping_memory(os.environ):  # as dist_train does after its first step
            print("FIGURE " + json.dumps(measure(strategy, int(devices), size)), flush=True)
            time.sleep(_LEAVE_S)
            os._exit(0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    this = (sys.executable, __file__, "--measure")
    launch = (sys.executable, "-m", "launch")
    commands = {}
    for size, label, counts in (("default", "", _COUNTS), ("large", ", large model", _COUNTS[:1])):
        commands[f"one device{label}"] = (*this, "default", "0", size)
        for n in counts:
            commands[f"mirrored, {n} devices{label}"] = (*this, "mirrored", str(n), size)
        for n in counts:
            worker = (*this, "multi_worker", "0", size)
            commands[f"{n} workers{label}"] = (*launch, f"--workers={n}", "--", *worker)
    print(f"{len(os.sched_getaffinity(0))} cores; µs\n")
    print("| | step | compute | reduction | update |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, command in commands.items():
            figures = re.findall(
                r"FIGURE (\{.*\})", run(command, Path(folder), {"PYTHONPATH": str(ROOT)})
            )
            each = [json.loads(figure) for figure in figures]
            cells = [
                f"{1e6 * statistics.median(figure[part] for figure in each):,.0f}"
                for part in ("step", "compute", "reduction", "update")
            ]
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
