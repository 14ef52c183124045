"""How training scales: reductions measured, a model fitted to them, checked, and carried on.

    pip install -e '.[bench]' && python tests/benchmarks/scaling.py --picture=scaling.png

2, 4 and 8 workers sum vectors, first over loopback, where the model of cost.py gets its constants;
then, as hosts of their own, over links of several latencies and rates (links.py), where the model
has to foretell what they take. The same for training steps with the gradients in one message or in
several. Then it says what 1,000 workers would do. All of it is in a private network; it needs root
and /dev/net/tun, and about 20 minutes on two cores.
"""

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests" / "integration"))
import hosts  # noqa: E402
import links  # noqa: E402
import scaling_report  # noqa: E402

_MS, _GBIT = 1e-3, 1e9 / 8
_LINKS = (  # latency one way [s], rate [bytes/s]; the relay itself takes about 0.05 ms
    (0.0, 10 * _GBIT),
    (0.1 * _MS, 1 * _GBIT),
    (1 * _MS, 10 * _GBIT),
    (1 * _MS, 1 * _GBIT),
    (10 * _MS, 1 * _GBIT),
    (0.1 * _MS, 0.1 * _GBIT),
)
_FLOATS = (1_000, 10_000, 100_000, 1_000_000, 5_000_000)
_FLOATS_OVER_LINKS = (1_000, 100_000, 1_000_000)
_EXCHANGED = (1, 4_000_000)
_TRAINED = 10_000_000
_BATCHES = (64, 256)
_BUCKETS = (0, 1, 2, 5, 10)
_BUCKET_LINKS = ((0.0, 10 * _GBIT), (0.1 * _MS, 1 * _GBIT))
_PORT = 20000


def options():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", default="2,4,8", help="numbers of workers; default: 2,4,8")
    parser.add_argument("--repeats", type=int, default=5, help="the least counts; default: 5")
    parser.add_argument(
        "--measured",
        type=Path,
        help="a file of what was measured, a JSON object a line; what it has is not done again",
    )
    parser.add_argument("--picture", type=Path, help="a .png to draw")
    chosen = parser.parse_args()
    chosen.workers = [int(each) for each in chosen.workers.split(",")]
    if chosen.repeats < 1 or min(chosen.workers) < 2:
        parser.error("--repeats is at least 1, and --workers are at least 2")
    return chosen


class Group:
    """Worker processes, one on each of some hosts; a context manager.

    Args:
      places: the host of each.
      addresses: 'host:port' of each.
      scratch: a folder for what they write to stderr.
    """

    def __init__(self, places, addresses, scratch):
        self._places, self._addresses, self._scratch = places, addresses, scratch
        self._processes = []

    def __enter__(self):
        cpus = sorted(os.sched_getaffinity(0))
        for index, place in enumerate(self._places):
            task = {"type": "worker", "index": index}
            environ = {
                "TF_CONFIG": json.dumps({"cluster": {"worker": self._addresses}, "task": task}),
                "PYTHONPATH": str(ROOT),
                "CUDA_VISIBLE_DEVICES": "-1",
                "TF_NUM_INTRAOP_THREADS": "1",
            }
            command = ["env", *(f"{name}={value}" for name, value in environ.items())]
            command += ["taskset", "--cpu-list", str(cpus[index % len(cpus)]), sys.executable]
            with (self._scratch / f"worker-{index}.log").open("wb") as log:
                process = place.start(
                    [*command, str(Path(__file__).with_name("scaling_worker.py"))],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                )
            self._processes.append(process)
        self._answers()
        return self

    def __exit__(self, failure, *_):
        for process in self._processes:
            process.stdin.close()  # ends it, unless it waits for one that failed: its host ends it
        for process in self._processes:
            if failure is None:
                process.wait(30)
            process.stdout.close()

    def ask(self, **order):
        """Seconds: the least of the repeats, each the mean of what the workers saw."""
        for process in self._processes:
            process.stdin.write(json.dumps(order).encode() + b"\n")
            process.stdin.flush()
        return min(map(statistics.fmean, zip(*self._answers(), strict=True)))

    def _answers(self):
        lines = [process.stdout.readline() for process in self._processes]
        for index, line in enumerate(lines):
            if not line:
                log = (self._scratch / f"worker-{index}.log").read_text(errors="replace")
                raise RuntimeError(f"worker {index} failed: {log.strip()[-1000:]}")
        return [json.loads(line) for line in lines]


def plan(kind, workers):
    """What is asked of so many workers in a sitting: (link, order) in turn.

    Args:
      kind: loopback, links or training; the link is None where it is loopback.
    """
    if kind == "loopback":
        for size in _EXCHANGED:
            yield None, {"what": "exchange", "size": size}
        for size, hint in itertools.product(_FLOATS, ("AUTO", "RING")):
            yield None, {"what": "reduce", "size": size, "hint": hint}
    elif kind == "links":
        for link in _LINKS:
            for size in _EXCHANGED:
                yield link, {"what": "exchange", "size": size}
            hints = ("AUTO", "GRID") if workers > 2 else ("AUTO",)
            for size, hint in itertools.product(_FLOATS_OVER_LINKS, hints):
                yield link, {"what": "reduce", "size": size, "hint": hint}
    else:
        for link, batch in itertools.product(_BUCKET_LINKS, _BATCHES):
            for compiled, buckets in itertools.product((True, False), _BUCKETS):
                how = {"batch": batch, "buckets": buckets, "compiled": compiled}
                yield link, {"what": "train", "size": _TRAINED, **how}


def measure(kind, workers, repeats, rows, keep):
    """Appends a row for each order of a plan that has none yet, and keeps them.

    Args:
      kind, workers: see `plan`.
      repeats: of each order.
      rows: dicts: an order with `workers`, `link` and `seconds` beside it.
      keep: fn(row), is called with each new one.
    """
    done = [scaling_report.row_key(row) for row in rows]
    orders = [
        (link, order)
        for link, order in plan(kind, workers)
        if {**order, "workers": workers, "link": link} not in done
    ]
    if not orders:
        return
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        names = [f"n{number}" for number in range(workers)]
        network = stack.enter_context(hosts.Network(folder, names))
        if kind == "loopback":
            places = [network.head] * workers
            addresses = [f"127.0.0.1:{_PORT + 10 * number}" for number in range(workers)]
        else:
            places = network.hosts
            cards = stack.enter_context(links.Links(places))
            addresses = [f"{address}:{_PORT}" for address in cards.addresses]
        group = stack.enter_context(Group(places, addresses, folder))
        for link, order in orders:
            if link is not None:
                cards.shape(latency_s=link[0], bytes_per_s=link[1])
            seconds = group.ask(**order, repeats=repeats)
            rows.append({**order, "workers": workers, "link": link, "seconds": seconds})
            keep(rows[-1])


def main():
    """Prints the tables."""
    chosen = options()
    if reason := hosts.why_not():
        sys.exit(f"scaling.py {reason}")
    rows = []
    if chosen.measured and chosen.measured.exists():
        rows = [json.loads(line) for line in chosen.measured.read_text().splitlines()]
    for row in rows:
        row["link"] = row["link"] and tuple(row["link"])

    def keep(row):
        print(row, file=sys.stderr)
        if chosen.measured:
            with chosen.measured.open("a") as file:
                file.write(json.dumps(row) + "\n")

    for kind, workers in itertools.product(("loopback", "links"), chosen.workers):
        measure(kind, workers, chosen.repeats, rows, keep)
    measure("training", 2, chosen.repeats, rows, keep)
    report = scaling_report.Report(rows, len(os.sched_getaffinity(0)))
    print(report.tables())
    if chosen.picture:
        report.draw(chosen.picture)


if __name__ == "__main__":
    main()
