"""What a training step of N workers costs: a model of TensorFlow's ring between CPUs.

TensorFlow sums a vector over N workers in a ring (`ring_alg.cc`, `ring_reducer.cc`; RING and AUTO
are the same between CPUs). Each worker cuts it into N chunks, and in each of 2 (N - 1) hops, all at
the same time, sends one chunk to the next worker and gets one from the worker before: N - 1 hops
to add up, as many to hand the sums round. So

    hops = 2 (N - 1)        chunk = bytes / N
    t = crowd · (start + hops · (hop + chunk · byte))            work of the processor
        + (hops + 1) · latency + hops · chunk / rate             the link

A hop is one gRPC call of the receiver, made ahead of time but for the first: one latency a hop, and
one more. A chunk is sent, copied and added as a whole, so that work and link add up. `crowd` is how
many workers share a core. The three constants of the work are fitted to reductions over loopback;
the two of the link are what plain sockets find.

The model knows no loss of packets, no other traffic, no slow worker (all wait for the slowest), and
no limit to how many workers TensorFlow's coordination service serves.
"""

import dataclasses
import math
from collections.abc import Iterable

import numpy as np

from dist_train.reduction import grid

# Of the arithmetic of a step, the forward pass does one third: for each product of the forward pass
# the backward pass does two.
_BACKWARD = 2 / 3


@dataclasses.dataclass(frozen=True)
class Link:
    """What lies between two workers.

    Attributes:
      latency_s: one way.
      bytes_per_s: that a worker can send, while it receives as many.
    """

    latency_s: float
    bytes_per_s: float


LOOPBACK = Link(0.0, math.inf)


@dataclasses.dataclass(frozen=True)
class Work:
    """What a reduction costs a worker's core.

    Attributes:
      start_s: of a reduction.
      hop_s: of a hop.
      byte_s: of a byte of a hop: serialised, sent, received, copied, added.
    """

    start_s: float
    hop_s: float
    byte_s: float


@dataclasses.dataclass(frozen=True)
class Step:
    """What else a step costs a worker's core.

    Attributes:
      example_s: forward and backward pass of an example.
      fixed_s: the rest, whatever the batch: above all the update of the weights.
    """

    example_s: float
    fixed_s: float


@dataclasses.dataclass(frozen=True)
class Sample:
    """A reduction that was measured.

    Attributes:
      size: bytes of the vector.
      workers: how many took part.
      crowd: how many of them shared a core.
      seconds: how long it took.
    """

    size: int
    workers: int
    crowd: float
    seconds: float


def reduction_s(
    size: float, workers: int, work: Work, link: Link = LOOPBACK, crowd: float = 1.0
) -> float:
    """Seconds of an all-reduce; 0 for one worker.

    Args:
      size: bytes of the vector.
      workers: how many take part.
      work, link: see there.
      crowd: how many workers share a core; at least 1.
    """
    if workers == 1:
        return 0.0
    hops = 2 * (workers - 1)
    chunk = size / workers
    processor = work.start_s + hops * (work.hop_s + chunk * work.byte_s)
    return crowd * processor + (hops + 1) * link.latency_s + hops * chunk / link.bytes_per_s


def grid_reduction_s(
    size: float, workers: int, work: Work, link: Link = LOOPBACK, crowd: float = 1.0
) -> float:
    """Seconds of an all-reduce over the rows of a grid and then over its columns.

    It is two rings (dist_train.reduction), with about 4 sqrt(N) hops instead of 2 N, and twice the
    bytes. Arguments as for `reduction_s`.
    """
    return sum(reduction_s(size, ring, work, link, crowd) for ring in grid(workers))


def fit(samples: Iterable[Sample]) -> Work:
    """The constants with the least sum of squares of *relative* errors; none is negative.

    Args:
      samples: over loopback, of more than one worker.
    """
    samples = list(samples)
    rows = []
    for sample in samples:
        hops = 2 * (sample.workers - 1)
        terms = np.array([1.0, hops, hops * sample.size / sample.workers])
        rows.append(sample.crowd * terms / sample.seconds)
    matrix = np.array(rows)
    used = np.ones(3, bool)
    while True:
        found = np.zeros(3)
        # Columns of like size: a byte costs a millionth of a hop.
        scale = np.linalg.norm(matrix[:, used], axis=0)
        found[used] = np.linalg.lstsq(matrix[:, used] / scale, np.ones(len(rows)))[0] / scale
        if np.all(found >= 0.0):
            return Work(*map(float, found))
        used &= found >= 0.0


def step_s(
    batch: float, size: float, workers: int, step: Step, work: Work, link: Link = LOOPBACK
) -> float:
    """Seconds of a training step, each worker on a core of its own.

    Args:
      batch: examples of all workers together.
      size: bytes of the gradients.
      workers: how many there are.
      step, work, link: see there.
    """
    own = batch / workers * step.example_s + step.fixed_s
    return own + reduction_s(size, workers, work, link)


def efficient_batch(
    efficiency: float, size: float, workers: int, step: Step, work: Work, link: Link
) -> float:
    """Examples a worker at which it spends this share of a step on them: (0, 1) -> examples."""
    rest = step.fixed_s + reduction_s(size, workers, work, link)
    return efficiency / (1.0 - efficiency) * rest / step.example_s


def best_workers(batch: float, size: float, step: Step, work: Work, link: Link) -> int:
    """With how many workers a step of this global batch takes least; at most one an example."""
    counts = sorted({round(1.02**power) for power in range(1000) if 1.02**power <= batch})
    return min(counts, key=lambda workers: step_s(batch, size, workers, step, work, link))


def bucket_bytes(workers: int, work: Work, link: Link) -> float:
    """The size of a message that costs as much for its bytes as for its hops.

    A vector that is reduced in parts pays the hops for each part; parts of less than this would
    take more than twice as long as the whole.
    """
    per_hop = work.hop_s + link.latency_s
    return workers * per_hop / (work.byte_s + 1.0 / link.bytes_per_s)


def hidden_s(
    batch: float, size: float, workers: int, step: Step, work: Work, link: Link, buckets: int
) -> float:
    """Seconds that a step gains at best from reducing gradients in buckets; negative: it loses.

    The link then works while the backward pass goes on, but for the last bucket; the core, which
    has no time to spare, does not. Each further bucket costs its hops.
    """
    if workers == 1:
        return 0.0
    wire = reduction_s(size, workers, Work(0.0, 0.0, 0.0), link)
    backward = _BACKWARD * batch / workers * step.example_s
    more = (buckets - 1) * reduction_s(0.0, workers, work, link)
    return min(backward, wire) * (1.0 - 1.0 / buckets) - more
