import baseline
import pytest


def runs(monkeypatch, *steps):
    """A run that has one case, with these steps per second one time after the other."""
    monkeypatch.setattr(baseline, "CASES", {"default": {}})
    left = list(steps)
    return lambda name: {"step": left.pop(0), "products": 1000.0}


def test_what_the_band_allows_is_enough(monkeypatch):
    ratios, slow = baseline.check({"default": 1.0}, runs(monkeypatch, 400.0), print)
    assert ratios == {"default": pytest.approx(0.4)}
    assert slow == []


def test_a_case_that_is_slow_once_is_measured_again(monkeypatch):
    ratios, slow = baseline.check({"default": 1.0}, runs(monkeypatch, 390.0, 700.0), print)
    assert ratios == {"default": pytest.approx(0.7)}
    assert slow == []


def test_a_case_that_is_slow_twice_fails(monkeypatch):
    _, slow = baseline.check({"default": 1.0}, runs(monkeypatch, 390.0, 399.0), print)
    assert slow == ["default"]


def test_the_stored_baseline_has_all_cases():
    assert set(baseline.read()) == set(baseline.CASES)
