"""Lists of nodes as Slurm abbreviates them, and the placement of tasks on them."""

import itertools
import re
from collections.abc import Sequence

from dist_train.errors import UsageError

# Slurm's own bound on the nodes of a cluster: a longer list is no list.
_MOST_NODES = 65536
_ITEM = re.compile(r"(?:[^\[\],\s]|\[[^\[\]\s]*\])+", re.ASCII)
_PART = re.compile(r"\[([^\[\]]*)\]|([^\[\]]+)")
_RANGE = re.compile(r"(\d{1,18})(?:-(\d{1,18}))?", re.ASCII)
_COUNT = re.compile(r"(\d{1,6})(?:\(x(\d{1,6})\))?", re.ASCII)


def expand(text: str) -> list[str]:
    """`rack[1-2]n[01-02],m7` -> rack1n01, rack1n02, rack2n01, rack2n02, m7.

    The order is Slurm's: as written, the last bracket varies fastest. A number is as wide as the
    first of its range is written.

    Raises:
      UsageError: it is not such a list.
    """
    names: list[str] = []
    end = 0
    for match in _ITEM.finditer(text):
        if text[end : match.start()] != ("," if end else ""):
            break
        end = match.end()
        names += _expand_item(match[0], text)
    if end != len(text) or not names:
        raise _unreadable(text)
    return names


def _expand_item(item: str, text: str) -> list[str]:
    choices: list[list[str]] = []
    total = 1
    for match in _PART.finditer(item):
        if match[2] is not None:
            choices.append([match[2]])
            continue
        numbers: list[str] = []
        for part in match[1].split(","):
            bounds = _RANGE.fullmatch(part)
            if bounds is None:
                raise _unreadable(text)
            first, last = int(bounds[1]), int(bounds[2] or bounds[1])
            total_here = last - first + 1 + len(numbers)
            if last < first or total * total_here > _MOST_NODES:
                raise _unreadable(text)
            numbers += [f"{number:0{len(bounds[1])}d}" for number in range(first, last + 1)]
        choices.append(numbers)
        total *= len(numbers)
    return ["".join(parts) for parts in itertools.product(*choices)]


def expand_counts(text: str) -> list[int]:
    """`2(x3),1` -> [2, 2, 2, 1].

    Raises:
      UsageError: it is not such a list.
    """
    counts: list[int] = []
    for part in text.split(","):
        match = _COUNT.fullmatch(part)
        if match is None or len(counts) + int(match[2] or 1) > _MOST_NODES:
            raise UsageError(
                f"SLURM_STEP_TASKS_PER_NODE={text[:80]!r} is not a list like '2(x3),1'"
            )
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def block(counts: Sequence[int]) -> list[int]:
    """The node of each task: all of the first node, then all of the second."""
    return [node for node, count in enumerate(counts) for _ in range(count)]


def plane(counts: Sequence[int], size: int) -> list[int]:
    """The node of each task: `size` to each node in turn, as long as it has room."""
    left = list(counts)
    nodes: list[int] = []
    while any(left):
        for node, room in enumerate(left):
            taken = min(size, room)
            nodes += [node] * taken
            left[node] -= taken
    return nodes


def cyclic(counts: Sequence[int]) -> list[int]:
    """The node of each task: one to each node in turn, as long as it has room."""
    return plane(counts, 1)


def _unreadable(text: str) -> UsageError:
    return UsageError(
        f"SLURM_STEP_NODELIST={text[:80]!r} is not a list of nodes like 'n[1-3,7],m2'"
    )
