"""Draws faults and the moments at which they strike, and does those that need a worker's help.

As a program it stands in for `python -m dist_train` under the launcher: what the environment's
FAULT says about this worker happens first.
"""

import dataclasses
import json
import os
import random
import runpy
import socket
import sys
import time

# What strikes from outside at a step, and what a worker meets at its start.
AT_A_STEP = ("sigkill", "sigterm", "sigint", "sigstop", "full disk", "kill all and truncate")
AT_THE_START = ("other flag", "late", "never", "port taken", "killed early")
SETTINGS = {
    "sgd": ["--optimizer=sgd", "--learning_rate=0.01"],
    "adam": ["--optimizer=adam", "--lr_schedule=cosine", "--warmup_steps=20", "--clip_norm=1"],
    "ema": ["--learning_rate=0.01", "--ema=0.9", "--gradient_accumulation=2"],
}


@dataclasses.dataclass(frozen=True)
class Fault:
    """One thing that goes wrong.

    Attributes:
      kind: of AT_A_STEP or AT_THE_START.
      worker: whom it strikes.
      step: the step after which it does; for the early kill, a number of milliseconds.
    """

    kind: str
    worker: int
    step: int


@dataclasses.dataclass(frozen=True)
class Round:
    """One start of the launcher."""

    strategy: str
    workers: int
    input: str
    steps_per_loop: int
    fault: Fault | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """All of a draw: rounds with faults, each started when the one before has ended, and one
    without."""

    settings: str
    checkpoint_steps: int
    rounds: tuple[Round, ...]


def draw(seed: int, kinds: tuple[str, ...] = AT_A_STEP + AT_THE_START) -> Plan:
    """The same plan for the same seed; consecutive seeds go through the kinds."""
    chance = random.Random(seed)

    def a_round(kind: str | None) -> Round:
        strategy, workers, fault = "multi_worker", chance.choice([2, 2, 3]), None
        if kind is not None:
            worker = chance.randrange(1 if kind in ("other flag", "never") else 0, workers)
            fault = Fault(kind, 0 if kind == "port taken" else worker, chance.randrange(1, 450))
        how = chance.choice(["resident", "stream"])
        if kind is None:
            strategy = chance.choice(["default", "mirrored", "multi_worker", "multi_worker"])
        return Round(strategy, workers, how, chance.choice([1, 3, 8]), fault)

    second = [chance.choice(kinds)] if chance.random() < 0.4 else []
    drawn = [kinds[seed % len(kinds)], *second]
    return Plan(
        settings=chance.choice(sorted(SETTINGS)),
        checkpoint_steps=chance.choice([5, 16, 40]),
        rounds=(*map(a_round, drawn), a_round(None)),
    )


def main() -> None:
    fault = Fault(**json.loads(os.environ["FAULT"]))
    if int(os.environ["DIST_LAUNCH_INDEX"]) == fault.worker and _first_time():
        if fault.kind == "other flag":
            sys.argv.append("--batch_size=50")
        elif fault.kind == "late":
            time.sleep(3)
        elif fault.kind == "never":
            time.sleep(600)
        elif fault.kind == "port taken":
            address = json.loads(os.environ["TF_CONFIG"])["cluster"]["worker"][0]
            occupied = socket.socket()
            occupied.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the launcher keeps it
            occupied.bind(("127.0.0.1", int(address.rpartition(":")[2])))
            occupied.listen()
            globals()["kept"] = occupied  # until this process ends
    runpy.run_module("dist_train", run_name="__main__", alter_sys=True)


def _first_time() -> bool:
    """A fault at the start strikes once, not again after each restart."""
    try:
        os.close(os.open("struck", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


if __name__ == "__main__":
    main()
