import pytest

from dist_train.pace import Pace


class _Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def _call(pace, clock, steps, seconds):
    with pace.call():
        clock.now += seconds
    pace.done(steps, agreed=pace.wish)


def test_a_call_makes_no_more_than_the_most_that_was_given():
    clock = _Clock()
    pace = Pace(7, clock)
    assert pace.wish == 1
    for seconds, wish in ((5.0, 1), (0.001, 7), (0.001, 7), (10.0, 1)):
        _call(pace, clock, 7 if wish == 7 else 1, seconds)
        assert pace.wish == wish


def test_the_next_call_makes_what_the_chief_has_wished():
    clock = _Clock()
    pace = Pace(None, clock)
    assert pace.steps == 1
    pace.done(1, agreed=3)
    assert (pace.steps, pace.wish) == (3, 1)


def test_steps_are_single_until_one_has_been_timed_without_compiling():
    clock = _Clock()
    pace = Pace(None, clock)
    assert pace.wish == 1
    _call(pace, clock, 1, 30.0)
    assert pace.wish == 1
    _call(pace, clock, 1, 0.25)
    assert pace.wish == 4


@pytest.mark.parametrize(
    ("steps", "seconds", "wish"),
    [(16, 0.01, 1600), (16, 2.0, 8), (1, 5.0, 1), (100, 1.0, 100), (3, 0.0, 1 << 20)],
)
def test_a_call_is_about_a_second(steps, seconds, wish):
    clock = _Clock()
    pace = Pace(None, clock)
    _call(pace, clock, 16, 1.0)
    _call(pace, clock, steps, seconds)
    assert pace.wish == pytest.approx(wish, abs=1)


def test_the_largest_wish_is_exact_in_float32():
    import numpy as np

    assert int(np.float32(Pace._MOST)) == Pace._MOST


def test_seconds_are_those_within_the_last_call():
    clock = _Clock()
    pace = Pace(None, clock)
    _call(pace, clock, 1, 2.0)
    clock.now += 50.0
    _call(pace, clock, 1, 3.0)
    clock.now += 50.0
    assert pace.seconds == pytest.approx(3.0)
