"""The cost model at its limits."""

import math

import cost
import pytest

WORK = cost.Work(start_s=1e-4, hop_s=2e-4, byte_s=1e-9)
LINK = cost.Link(latency_s=1e-3, bytes_per_s=1e8)
STEP = cost.Step(example_s=1e-3, fixed_s=1e-2)


def test_one_worker_reduces_for_nothing():
    assert cost.reduction_s(4e6, 1, WORK, LINK) == 0.0
    assert cost.step_s(64, 4e6, 1, STEP, WORK, LINK) == 64 * STEP.example_s + STEP.fixed_s


def test_the_link_alone_is_a_ring():
    free = cost.Work(0.0, 0.0, 0.0)
    sent = 2 * (8 - 1) / 8 * 4e6
    endless = cost.Link(0.0, 1e8)
    assert cost.reduction_s(4e6, 8, free, endless) == pytest.approx(sent / 1e8)
    assert cost.reduction_s(0, 8, free, LINK) == pytest.approx(15 * LINK.latency_s)


@pytest.mark.parametrize("workers", [2, 3, 8, 1000])
def test_more_bytes_more_workers_and_slower_links_take_longer(workers):
    def seconds(size=1e6, workers=workers, link=LINK, crowd=1.0):
        return cost.reduction_s(size, workers, WORK, link, crowd)

    assert seconds(size=2e6) > seconds()
    assert seconds(workers=workers + 1) > seconds()
    assert seconds(link=cost.Link(2e-3, 1e8)) > seconds()
    assert seconds(link=cost.Link(1e-3, 5e7)) > seconds()
    assert seconds(crowd=2.0) > seconds()
    assert seconds(link=cost.LOOPBACK, crowd=4.0) == pytest.approx(4 * seconds(link=cost.LOOPBACK))


def test_a_grid_has_fewer_hops_and_more_bytes():
    latency = cost.Work(0.0, WORK.hop_s, 0.0)
    assert cost.grid_reduction_s(0, 1000, latency) == pytest.approx((48 + 78) * WORK.hop_s)
    small, large = (4e3, 4e9)
    for size, wins in ((small, True), (large, False)):
        one = cost.reduction_s(size, 1000, WORK, LINK)
        assert (cost.grid_reduction_s(size, 1000, WORK, LINK) < one) is wins
    assert cost.grid_reduction_s(4e6, 7, WORK, LINK) == cost.reduction_s(4e6, 7, WORK, LINK)


def test_fit_finds_the_constants_that_made_the_samples():
    samples = [
        cost.Sample(size, workers, crowd, cost.reduction_s(size, workers, WORK, crowd=crowd))
        for workers, crowd in ((2, 1.0), (4, 2.0), (8, 4.0))
        for size in (4e3, 4e5, 2e7)
    ]
    found = cost.fit(samples)
    assert found.start_s == pytest.approx(WORK.start_s)
    assert found.hop_s == pytest.approx(WORK.hop_s)
    assert found.byte_s == pytest.approx(WORK.byte_s)


def test_fit_has_no_negative_constants():
    # The more bytes, the less time: no such machine.
    samples = [cost.Sample(4000, 2, 1.0, 2e-3), cost.Sample(4_000_000, 2, 1.0, 1e-3)]
    found = cost.fit(samples)
    assert found.byte_s == 0.0
    assert min(found.start_s, found.hop_s) >= 0.0


def test_the_efficient_batch_has_that_efficiency():
    own = cost.efficient_batch(0.8, 4e6, 50, STEP, WORK, LINK)
    whole = cost.step_s(50 * own, 4e6, 50, STEP, WORK, LINK)
    assert own * STEP.example_s / whole == pytest.approx(0.8)


def test_the_best_number_of_workers_is_that_of_the_derivative():
    # Without bytes, t = batch · example / N + 2 N (hop + latency) + constants.
    best = cost.best_workers(10_000, 0, STEP, WORK, LINK)
    root = math.sqrt(10_000 * STEP.example_s / (2 * (WORK.hop_s + LINK.latency_s)))
    assert best == pytest.approx(root, rel=0.02)
    assert cost.best_workers(1, 4e6, STEP, WORK, LINK) == 1


def test_a_bucket_of_the_proposed_size_takes_twice_the_time_of_its_hops():
    work, link = cost.Work(0.0, WORK.hop_s, WORK.byte_s), cost.Link(0.0, LINK.bytes_per_s)
    size = cost.bucket_bytes(16, work, link)
    assert cost.reduction_s(size, 16, work, link) == pytest.approx(
        2 * cost.reduction_s(0, 16, work, link)
    )


def test_one_bucket_hides_nothing_and_too_many_lose():
    link = cost.Link(1e-4, 1e7)
    arguments = (256, 4e7, 2, STEP, WORK, link)
    assert cost.hidden_s(*arguments, buckets=1) == 0.0
    assert 0.0 < cost.hidden_s(*arguments, buckets=4) < 256 / 2 * STEP.example_s
    assert cost.hidden_s(*arguments, buckets=1000) < 0.0
