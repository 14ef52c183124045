"""Slurm's lists of nodes and tasks."""

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_train import UsageError
from dist_train.environments import nodelist


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n1", "n1"),
        ("n[1-3,7]", "n1 n2 n3 n7"),
        ("n[001-003]", "n001 n002 n003"),
        ("n[08-11]", "n08 n09 n10 n11"),
        ("n[8-11]", "n8 n9 n10 n11"),
        ("rack[1-2]n[1-2]", "rack1n1 rack1n2 rack2n1 rack2n2"),
        ("n[1-2]-ib", "n1-ib n2-ib"),
        ("n10,n2,a", "n10 n2 a"),
        ("n[2,10,1]", "n2 n10 n1"),
        ("m.example.org,n[1-2].x", "m.example.org n1.x n2.x"),
    ],
)
def test_list_expands_in_the_order_written(text, names):
    assert nodelist.expand(text) == names.split()


@pytest.mark.parametrize(
    "text",
    [
        *("", ",", "n1,", ",n1", "n1,,n2", "n[", "n[1", "n]", "n[]", "n[1-]", "n[2-1]", "n[a]"),
        *("n 1", "n[1-99999999999]", "n[1-300]m[1-300]", "n[[1]]", "n[١]", f"n[{'9' * 5000}]"),
    ],
)
def test_what_is_no_list_is_an_error_of_one_line(text):
    with pytest.raises(UsageError, match="is not a list of nodes like") as caught:
        nodelist.expand(text)
    assert len(str(caught.value).splitlines()) == 1


_RANGES = st.lists(
    st.tuples(st.integers(0, 120), st.integers(0, 12), st.integers(1, 4)), min_size=1, max_size=3
)
_TEXT = st.text("abz-.", min_size=1, max_size=3)


@given(st.lists(st.tuples(_TEXT, _RANGES, _TEXT, _RANGES), min_size=1, max_size=3))
def test_expansion_is_the_product_of_what_was_abbreviated(items):
    def numbers(ranges):
        return [
            str(number).zfill(width) for first, more, width in ranges
            for number in range(first, first + more + 1)
        ]  # fmt: skip

    def brackets(ranges):
        words = [
            f"{str(first).zfill(width)}-{str(first + more).zfill(width)}"
            for first, more, width in ranges
        ]
        return f"[{','.join(words)}]"

    # The width of a range is its first number's, so only such are written.
    items = [
        (a, [(f, m, max(w, len(str(f)))) for f, m, w in x], b, [(f, m, w) for f, m, w in y])
        for a, x, b, y in items
    ]
    text = ",".join(a + brackets(x) + b + brackets(y) for a, x, b, y in items)
    expected = [
        a + one + b + two
        for a, x, b, y in items
        for one, two in itertools.product(numbers(x), numbers(y))
    ]
    assert nodelist.expand(text) == expected


@given(st.text("n[]-,12 x", max_size=12))
def test_any_text_is_a_list_of_names_or_an_error(text):
    try:
        names = nodelist.expand(text)
    except UsageError:
        return
    assert names
    assert all(re.fullmatch(r"[^\[\],\s]+", name) for name in names)


@pytest.mark.parametrize(
    ("text", "counts"), [("2", [2]), ("1(x2)", [1, 1]), ("2(x3),1", [2, 2, 2, 1])]
)
def test_counts_expand(text, counts):
    assert nodelist.expand_counts(text) == counts


@pytest.mark.parametrize("text", ["", "2,", "2(x)", "x2", "2(x3", "-1", "1(x999999)", "²"])
def test_what_is_no_list_of_counts_is_an_error(text):
    with pytest.raises(UsageError, match="SLURM_STEP_TASKS_PER_NODE"):
        nodelist.expand_counts(text)


def test_layouts_place_tasks_as_slurm_documents_them():
    assert nodelist.block([2, 1, 2]) == [0, 0, 1, 2, 2]
    assert nodelist.cyclic([3, 1, 2]) == [0, 1, 2, 0, 2, 0]
    assert nodelist.plane([4, 2, 3], 2) == [0, 0, 1, 1, 2, 2, 0, 0, 2]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=5), st.integers(1, 6))
def test_every_layout_gives_each_node_its_tasks(counts, size):
    for nodes in (
        nodelist.block(counts), nodelist.cyclic(counts), nodelist.plane(counts, size)
    ):  # fmt: skip
        assert [nodes.count(node) for node in range(len(counts))] == counts
