"""The budget of restarts."""

import pytest

from launch.report import Ended, Ending
from launch.restart import RestartPolicy


def ending(code=1, slot=0, slots=(0, 1, 2), lasted_s=1.0, step=None, tail=b""):
    """A group in which the worker at `slot` ended with `code`, and the others on request."""
    return Ending(
        tuple(
            Ended(
                name=f"worker {index}",
                slot=each,
                pid=1,
                code=code if each == slot else 75,
                at_s=1.0 if each == slot else 2.0,
                asked=each != slot,
                tail=tail if each == slot else b"",
            )
            for index, each in enumerate(slots)
        ),
        lasted_s,
        step,
    )


def policy(max_restarts=3, most=3, least=3):
    return RestartPolicy(max_workers=most, min_workers=least, max_restarts=max_restarts)


def test_failures_use_up_the_restarts_with_growing_delays():
    budget = policy(max_restarts=3)
    assert [budget.after(ending(slot=slot)).delay_s for slot in (0, 1, 2)] == [1.0, 2.0, 4.0]
    assert budget.after(ending()) is None


def test_delay_has_a_bound():
    budget = policy(max_restarts=20)
    assert [budget.after(ending()).delay_s for _ in range(20)][-1] == 30.0


@pytest.mark.parametrize("codes", [(0,), (0, 0, 0)])
def test_nothing_follows_on_success(codes):
    slots = tuple(range(len(codes)))
    done = Ending(tuple(Ended(f"worker {slot}", slot, 1, 0, 1.0) for slot in slots), 1.0, None)
    assert policy(most=len(codes), least=len(codes)).after(done) is None


def test_failed_evaluator_restarts_nothing():
    done = Ending((Ended("worker 0", 0, 1, 0, 1.0), Ended("evaluator", None, 2, 1, 0.5)), 1.0, None)
    assert policy(most=1, least=1).after(done) is None


def test_minute_of_progress_resets_the_count():
    budget = policy(max_restarts=1)
    for step in range(100, 105):
        assert budget.after(ending(lasted_s=60.0, step=step)) is not None


def test_minutes_without_getting_further_are_no_progress():
    budget = policy(max_restarts=1)
    assert budget.after(ending(lasted_s=600.0, step=100)) is not None
    assert budget.after(ending(lasted_s=600.0, step=100)) is None


@pytest.mark.parametrize("code", [1, 75])
def test_restarts_end_however_long_the_attempts_last_if_no_heartbeat_comes(code):
    # Workers that never meet, say: --start_timeout_s is more than a minute.
    budget = policy(max_restarts=2)
    restarts = [budget.after(ending(code, lasted_s=120.0)) is not None for _ in range(9)]
    assert restarts.count(True) == {1: 2, 75: 3 + 2}[code]


@pytest.mark.parametrize("code", [75, 143, -15])
def test_stops_on_request_do_not_count_but_end_without_progress(code):
    budget = policy(max_restarts=1)
    assert [budget.after(ending(code)) is not None for _ in range(5)] == [True] * 4 + [False]
    for step in range(100, 109):
        assert budget.after(ending(code, lasted_s=60.0, step=step)) is not None


def test_nothing_is_restarted_at_max_restarts_0_but_a_lost_port():
    taken = ending(tail=b"OSError: [Errno 98] Address already in use")
    assert policy(max_restarts=0).after(ending(75)) is None
    assert policy(max_restarts=0).after(ending(1)) is None
    budget = policy(max_restarts=0)
    assert [budget.after(taken) is not None for _ in range(4)] == [True] * 3 + [False]


def test_lost_port_is_retried_with_released_ports():
    following = policy().after(ending(tail=b"UnknownError: Could not start gRPC server"))
    assert following.release_ports
    assert following.delay_s == 0


def test_place_that_fails_first_twice_is_left_out_down_to_the_minimum():
    budget = policy(max_restarts=2, most=3, least=2)
    assert budget.after(ending(slot=1)).slots == (0, 1, 2)
    following = budget.after(ending(slot=1))
    assert following.slots == (0, 2)
    assert following.why == "place 1 is left out"
    assert budget.after(ending(slot=2, slots=(0, 2))).slots == (0, 2)
    assert budget.after(ending(slot=2, slots=(0, 2))) is None


def test_place_of_a_worker_that_only_lost_its_peer_is_not_left_out():
    budget = policy(max_restarts=2, most=3, least=1)
    for _ in range(2):
        assert budget.after(ending(slot=1, tail=b"Socket closed")).slots == (0, 1, 2)


def test_place_that_was_left_out_comes_back_after_progress():
    budget = policy(max_restarts=1, most=3, least=1)
    budget.after(ending(slot=1))
    assert budget.after(ending(slot=1)).slots == (0, 2)
    assert budget.after(ending(slot=0, slots=(0, 2), lasted_s=100.0, step=100)).slots == (0, 1, 2)
