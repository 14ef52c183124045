"""Who is overdue and who is behind, on a clock of our own."""

import pytest

from launch.heartbeat import Watch


@pytest.fixture
def watch():
    return Watch(["worker 0", "worker 1"], start_timeout_s=100, stall_timeout_s=10)


def test_nobody_is_watched_before_the_first_heartbeat(watch):
    assert not watch.is_overdue(1e9)


def test_silence_beyond_the_bound_is_overdue(watch):
    watch.beat("worker 0", "1", 0.0)
    watch.beat("worker 1", "1", 5.0)
    assert not watch.is_overdue(10.0)
    assert watch.is_overdue(10.1)
    watch.beat("worker 0", "1", 10.2)  # the same step again is a sign of life too
    assert not watch.is_overdue(10.3)


def test_peers_of_the_first_to_beat_have_the_start_timeout(watch):
    for now in range(50, 151):
        watch.beat("worker 0", "1", float(now))
    assert not watch.is_overdue(150.0)
    assert watch.is_overdue(150.1)
    worker, why = watch.behind({}, 150.1)
    assert (worker, why) == (
        "worker 1",
        "has written no heartbeat in the 100 s since a peer's first one",
    )


def test_ended_worker_is_not_overdue(watch):
    watch.beat("worker 0", "1", 0.0)
    watch.beat("worker 1", "1", 0.0)
    watch.end("worker 0")
    watch.beat("worker 1", "2", 9.0)
    assert not watch.is_overdue(15.0)


def test_evaluator_is_not_watched(watch):
    watch.beat("evaluator", "1", 0.0)
    assert not watch.is_overdue(1e9)


def test_lowest_step_is_behind_though_it_spoke_last(watch):
    watch.beat("worker 1", "5", 0.0)
    watch.beat("worker 0", "4", 1.0)
    assert watch.behind({}, 20.0) == (
        "worker 0",
        "has been silent for 19 s at step 4 (the furthest is 5)",
    )


def test_longest_silence_is_behind_at_equal_steps(watch):
    watch.beat("worker 0", "5", 1.0)
    watch.beat("worker 1", "5", 0.0)
    assert watch.behind({}, 20.0)[0] == "worker 1"


def test_stopped_process_is_behind_whatever_its_step(watch):
    watch.beat("worker 0", "4", 0.0)
    watch.beat("worker 1", "5", 1.0)
    worker, why = watch.behind({"worker 0": "S", "worker 1": "T"}, 20.0)
    assert worker == "worker 1"
    assert why.endswith("its process is stopped (state T)")


def test_heartbeats_without_a_step_count_too(watch):
    watch.beat("worker 0", "", 0.0)
    watch.beat("worker 1", "alive", 5.0)
    assert watch.behind({}, 20.0) == ("worker 0", "has been silent for 20 s")
    assert watch.highest_step is None
