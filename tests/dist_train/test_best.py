import math

import pytest

from dist_train.best import Best


def test_nothing_is_the_best_before_the_first_validation():
    best = Best(least=True)
    assert math.isnan(best.value)
    assert (best.step, best.since) == (None, 0)


def test_what_is_forgotten_is_no_best_any_more():
    best = Best(least=False)
    for step, value in enumerate([1.5, 0.5], start=1):
        best.see(value, step)
    best.forget()
    assert math.isnan(best.value)
    assert (best.step, best.since) == (None, 0)
    assert best.see(0.5, 3)


@pytest.mark.parametrize(
    ("least", "seen", "found"),
    [
        (True, [2.0, 1.0, 3.0], (1.0, 20, 1)),
        (False, [2.0, 1.0, 3.0], (3.0, 30, 0)),
        (True, [1.0, 1.0, 1.0], (1.0, 10, 2)),
        (True, [1.0, 1.0 - 5e-7, 1.0 - 2e-6], (1.0 - 2e-6, 30, 0)),
        (False, [-1.0, -1.0 + 5e-7], (-1.0, 10, 1)),
        (True, [math.nan, math.nan], (math.nan, None, 2)),
        (True, [math.nan, 5.0, math.nan], (5.0, 20, 1)),
        (True, [math.inf, 5.0], (5.0, 20, 0)),
    ],
)
def test_the_best_of_some_validations(least, seen, found):
    best = Best(least=least)
    verdicts = [best.see(value, 10 * number) for number, value in enumerate(seen, start=1)]
    assert best.value == pytest.approx(found[0], rel=1e-12, nan_ok=True)
    assert (best.step, best.since) == found[1:]
    assert [10 * n for n, verdict in enumerate(verdicts, start=1) if verdict][-1:] == (
        [] if best.step is None else [best.step]
    )
