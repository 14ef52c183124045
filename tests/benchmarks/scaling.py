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
_EXCHANGED = (1, 100_000, 1_000_000)
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
        "--measured", type=Path, help="a file for what was measured; what it has is not done again"
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
        """The least of the seconds that the first worker measured."""
        for process in self._processes:
            process.stdin.write(json.dumps(order).encode() + b"\n")
            process.stdin.flush()
        return min(self._answers()[0])

    def _answers(self):
        lines = [process.stdout.readline() for process in self._processes]
        for index, line in enumerate(lines):
            if not line:
                log = (self._scratch / f"worker-{index}.log").read_text(errors="replace")
                raise RuntimeError(f"worker {index} failed: {log.strip()[-1000:]}")
        return [json.loads(line) for line in lines]


def measure(workers, repeats):
    """All that is measured with so many workers: a list of rows.

    A row has `what` (exchange, reduce or train), `workers`, `link` ([latency, rate], or None for
    loopback), what was asked for and `seconds`.
    """
    rows = []

    def note(group, link, what, **order):
        seconds = group.ask(what=what, **order, repeats=repeats)
        rows.append({"what": what, "workers": workers, "link": link, **order, "seconds": seconds})
        print(f"{workers} workers, {link}, {what} {order}: {1e3 * seconds:.3f} ms", file=sys.stderr)

    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        names = [f"n{number}" for number in range(workers)]
        network = stack.enter_context(hosts.Network(folder, names))
        cards = stack.enter_context(links.Links(network.hosts))
        addresses = [f"127.0.0.1:{_PORT + 10 * number}" for number in range(workers)]
        with Group([network.head] * workers, addresses, folder) as group:
            for size in _EXCHANGED:
                note(group, None, "exchange", size=size)
            for size, hint in itertools.product(_FLOATS, ("AUTO", "RING")):
                note(group, None, "reduce", size=size, hint=hint)
        addresses = [f"{address}:{_PORT}" for address in cards.addresses]
        with Group(network.hosts, addresses, folder) as group:
            for link in _LINKS:
                cards.shape(latency_s=link[0], bytes_per_s=link[1])
                for size in _EXCHANGED:
                    note(group, link, "exchange", size=size)
                for size in _FLOATS_OVER_LINKS:
                    note(group, link, "reduce", size=size, hint="AUTO")
                    if workers > 2:
                        note(group, link, "reduce", size=size, hint="GRID")
            if workers > 2:
                return rows
            for link, batch in itertools.product(_BUCKET_LINKS, _BATCHES):
                cards.shape(latency_s=link[0], bytes_per_s=link[1])
                for compiled, buckets in itertools.product((True, False), _BUCKETS):
                    how = {"batch": batch, "buckets": buckets, "compiled": compiled}
                    note(group, link, "train", size=_TRAINED, **how)
    return rows


def main():
    """Prints the tables."""
    chosen = options()
    if reason := hosts.why_not():
        sys.exit(f"scaling.py {reason}")
    rows = []
    if chosen.measured and chosen.measured.exists():
        rows = json.loads(chosen.measured.read_text())
    for workers in chosen.workers:
        if any(row["workers"] == workers for row in rows):
            continue
        rows += measure(workers, chosen.repeats)
        if chosen.measured:
            chosen.measured.write_text(json.dumps(rows, indent=0))
    for row in rows:
        row["link"] = row["link"] and tuple(row["link"])
    report = scaling_report.Report(rows, len(os.sched_getaffinity(0)))
    print(report.tables())
    if chosen.picture:
        report.draw(chosen.picture)


if __name__ == "__main__":
    main()
