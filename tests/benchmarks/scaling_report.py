"""What `scaling.py` makes of its measurements: tables in Markdown, and a picture."""

import itertools
import math

import cost
import numpy as np

_MS, _GBIT = 1e-3, 1e9 / 8
_FLOAT = 4
_EFFICIENCY = 0.8

# What is foretold.
_MANY = 1_000
_MODELS = {"55 k": 55_000, "10 M": 10_000_000, "100 M": 100_000_000}
_NETWORKS = (
    cost.Link(0.1 * _MS, 1 * _GBIT),
    cost.Link(0.05 * _MS, 10 * _GBIT),
    cost.Link(0.02 * _MS, 100 * _GBIT),
    cost.Link(10 * _MS, 1 * _GBIT),
)


class Report:
    """The model that fits some measurements, and what follows from it.

    Args:
      rows: of `scaling.measure`; of each `workers` a whole sitting.
      cores: how many the workers shared.

    Attributes:
      work: the constants of a reduction.
      step: those of the rest of a step, of a model of one weight (of dense layers, which take six
        operations a weight and example).
    """

    def __init__(self, rows, cores):
        self._rows = rows
        self._cores = cores
        self._workers = sorted({row["workers"] for row in rows})
        self._links = list(dict.fromkeys(row["link"] for row in rows if row["what"] == "reduce"))
        self._links.remove(None)
        self.work = cost.fit(
            cost.Sample(_FLOAT * row["size"], row["workers"], self._crowd(row), row["seconds"])
            for row in self._some(what="reduce", link=None, hint="AUTO")
        )
        alone = self._some(what="train", link=self._links[0], buckets=0, compiled=True)
        slope, rest = np.polyfit(
            [row["batch"] for row in alone], [row["seconds"] for row in alone], 1
        )
        weights = alone[0]["size"]
        self.step = cost.Step(slope / weights, max(rest, 0.0) / weights)

    def tables(self):
        """All of them, as one text."""
        work, step = self.work, self.step
        return "\n\n".join(
            [
                f"A reduction costs a core {_time(work.start_s)}, {_time(work.hop_s)} a hop and"
                f" {1e9 * work.byte_s:.2f} ns a byte of a hop; the rest of a step"
                f" {1e9 * step.fixed_s:.1f} ns a weight, and {1e9 * step.example_s:.2f} ns an"
                f" example and weight ({6e-9 / step.example_s:.0f} Gflop/s).",
                self._loopback(),
                self._over_links(),
                self._implementations(),
                self._buckets(),
                self._foretold(),
            ]
        )

    def draw(self, path):
        """Writes the picture, a .png."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
        for workers in self._workers:
            pairs = [
                (row["seconds"], self._predicted_s(row))
                for row in self._some(what="reduce", hint="AUTO", workers=workers)
            ]
            left.loglog(*zip(*pairs, strict=True), "o", alpha=0.6, label=f"{workers} workers")
        ends = [1e-4, 2.0]
        left.loglog(ends, ends, color="grey", linewidth=0.8)
        left.set(xlabel="all-reduce measured [s]", ylabel="predicted [s]")
        left.legend()
        counts = np.unique(np.geomspace(1, _MANY, 60).astype(int))
        for (name, weights), link in itertools.product(_MODELS.items(), _NETWORKS[:2]):
            step = self._step_of(weights)
            shares = [
                64
                * step.example_s
                / cost.step_s(64 * n, _FLOAT * weights, int(n), step, self.work, link)
                for n in counts
            ]
            right.semilogx(counts, shares, label=f"{name} weights, {_link(link)}")
        right.set(xlabel="workers, 64 examples each", ylabel="share of a step in its examples")
        right.set_ylim(0, 1)
        right.legend(fontsize=8)
        figure.savefig(path, dpi=120)

    def _some(self, **wanted):
        return [
            row
            for row in self._rows
            if all(row.get(name, "") == value for name, value in wanted.items())
        ]

    def _seconds(self, **wanted):
        (row,) = self._some(**wanted)
        return row["seconds"]

    def _sizes(self, link):
        return {row["size"] for row in self._some(what="reduce", link=link)}

    def _crowd(self, row):
        return max(1.0, row["workers"] / self._cores)

    def _step_of(self, weights):
        return cost.Step(self.step.example_s * weights, self.step.fixed_s * weights)

    def _link(self, link, workers):
        """What plain sockets find that a link adds to loopback, at most at the rate it has.

        It seems faster where one worker already sends while the one before it still receives.
        """
        if link is None:
            return cost.LOOPBACK
        hops = {
            (place, row["size"]): row["seconds"]
            for place in (None, link)
            for row in self._some(what="exchange", workers=workers, link=place)
        }
        small, *_, large = sorted({size for _, size in hops})
        latency = hops[link, small] - hops[None, small]
        more = hops[link, large] - hops[None, large] - latency
        rate = (large - small) / more if more > 0 else math.inf
        return cost.Link(max(latency, 0.0), min(rate, link[1]))

    def _predicted_s(self, row):
        link = self._link(row["link"], row["workers"])
        size = _FLOAT * row["size"]
        seconds = cost.grid_reduction_s if row["hint"] == "GRID" else cost.reduction_s
        return seconds(size, row["workers"], self.work, link, self._crowd(row))

    def _loopback(self):
        lines = []
        sizes = sorted(self._sizes(None))
        for workers in self._workers:
            cells = [str(workers)]
            for size in sizes:
                (row,) = self._some(
                    what="reduce", link=None, workers=workers, size=size, hint="AUTO"
                )
                ratio = self._predicted_s(row) / row["seconds"]
                cells.append(f"{_time(row['seconds'])} ({ratio:.2f})")
            lines.append(cells)
        heads = [f"{size:,} floats" for size in sizes]
        return _table(["workers, loopback: measured (predicted / measured)", *heads], lines)

    def _over_links(self):
        everything, texts = [], []
        for hint, what in (("AUTO", "one ring"), ("GRID", "two rings: rows, columns of a grid")):
            lines = []
            for link in self._links:
                cells = [_link(cost.Link(*link))]
                for workers in self._workers:
                    rows = self._some(what="reduce", link=link, workers=workers, hint=hint)
                    ratios = [self._predicted_s(row) / row["seconds"] for row in rows]
                    everything += ratios
                    shown = " · ".join(f"{ratio:.2f}" for ratio in ratios)
                    cells.append(f"{shown} ({_link(self._link(link, workers))})" if rows else "")
                lines.append(cells)
            sizes = ", ".join(f"{size:,}" for size in sorted(self._sizes(link)))
            heads = [f"{n} workers (link as found)" for n in self._workers]
            texts.append(_table([f"{what}; predicted / measured: {sizes} floats", *heads], lines))
        errors = np.exp(np.abs(np.log(everything)))
        texts.append(
            f"Of {len(errors)} reductions over links, half are within a factor"
            f" {np.median(errors):.2f} of what was predicted, nine of ten within"
            f" {np.quantile(errors, 0.9):.2f}, all within {np.max(errors):.2f}."
        )
        return "\n\n".join(texts)

    def _implementations(self):
        ratios = [
            row["seconds"] / self._seconds(**{**row_key(row), "hint": "AUTO"})
            for row in self._some(what="reduce", hint="RING")
        ]
        return (
            f"RING takes {np.median(ratios):.2f} of the time of AUTO (median of {len(ratios)};"
            f" {min(ratios):.2f} to {max(ratios):.2f})."
        )

    def _buckets(self):
        train = self._some(what="train")
        ways = list(dict.fromkeys((row["buckets"], row["compiled"]) for row in train))
        lines = []
        for link, batch in dict.fromkeys((row["link"], row["batch"]) for row in train):
            cells = [_link(cost.Link(*link)), str(batch)]
            for buckets, compiled in ways:
                seconds = self._seconds(
                    what="train", link=link, batch=batch, buckets=buckets, compiled=compiled
                )
                cells.append(f"{1e3 * seconds:.0f}")
            gains = [
                cost.hidden_s(
                    2 * batch,
                    _FLOAT * train[0]["size"],
                    2,
                    self._step_of(train[0]["size"]),
                    self.work,
                    self._link(link, 2),
                    buckets,
                )
                for buckets in sorted({buckets for buckets, _ in ways} - {0, 1})
            ]
            cells.append(" · ".join(f"{1e3 * gain:.0f}" for gain in gains))
            lines.append(cells)
        heads = [
            ("no reduction" if buckets == 0 else f"{buckets} message{'s'[: buckets - 1]}")
            + (", XLA" if compiled else "")
            for buckets, compiled in ways
        ]
        heads = ["2 workers, 10 M weights; ms a step", "examples each", *heads]
        return _table([*heads, "gain foretold for the last ones"], lines)

    def _foretold(self):
        lines = []
        for (name, weights), link in itertools.product(_MODELS.items(), _NETWORKS):
            step, size = self._step_of(weights), _FLOAT * weights
            reduction = cost.reduction_s(size, _MANY, self.work, link)
            grid = cost.grid_reduction_s(size, _MANY, self.work, link)
            whole = cost.step_s(64 * _MANY, size, _MANY, step, self.work, link)
            own = cost.efficient_batch(_EFFICIENCY, size, _MANY, step, self.work, link)
            lines.append(
                [
                    name,
                    _link(link),
                    _time(reduction),
                    _time(grid),
                    f"{64 * step.example_s / whole:.0%}",
                    _rounded(own),
                    _rounded(own * _MANY),
                    f"{cost.best_workers(64 * _MANY, size, step, self.work, link):,}",
                    f"{cost.bucket_bytes(_MANY, self.work, link) / 1e6:.1f} MB",
                ]
            )
        heads = [
            "weights",
            "link",
            f"all-reduce, {_MANY:,} workers",
            "in two rings",
            "share of a step in 64 examples each",
            f"examples each for {_EFFICIENCY:.0%}",
            "global batch",
            "quickest number of workers for a batch of 64,000",
            "message of equal latency and transfer",
        ]
        return _table(heads, lines)


def row_key(row):
    """What was asked for, without what it took."""
    return {name: value for name, value in row.items() if name != "seconds"}


def _table(heads, lines):
    marks = ["---"] * len(heads)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [heads, marks, *lines])


def _time(seconds):
    return f"{seconds:.2f} s" if seconds >= 1.0 else f"{1e3 * seconds:.3g} ms"


def _rounded(count):
    return f"{float(f'{count:.2g}'):,.0f}"


def _link(link):
    return f"{link.bytes_per_s / _GBIT:.3g} Gbit/s, {link.latency_s / _MS:.3g} ms"
