"""Intervals and verdicts, against scipy and by hand."""

import math

import pytest
from scipy import stats

from convmixer.results.statistics import Interval, mean_interval, paired_difference, verdict, wilson


def test_interval_equals_scipy() -> None:
    values = [70.1, 71.4, 69.8, 70.9]
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    got = mean_interval(values)
    assert (got.low, got.high) == pytest.approx((low, high), rel=1e-12)
    assert got.n == 4


def test_one_value_has_no_interval() -> None:
    assert mean_interval([3.0]) == Interval(3.0, -math.inf, math.inf, 1)
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])


def test_pairing_uses_shared_seeds_and_removes_what_a_seed_does() -> None:
    first = {0: 80.0, 1: 70.0, 2: 60.0, 9: 0.0}
    second = {0: 79.0, 1: 69.1, 2: 58.9, 8: 100.0}
    got = paired_difference(first, second)
    assert got is not None
    assert (got.mean, got.n) == (pytest.approx(1.0), 3)
    low, high = stats.ttest_rel([80.0, 70.0, 60.0], [79.0, 69.1, 58.9]).confidence_interval()
    assert (got.low, got.high) == pytest.approx((low, high))
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


@pytest.mark.parametrize(
    ("low", "high", "relation", "expected"),
    [
        (1.2, 3.0, "better", "supported"),
        (0.5, 3.0, "better", "not decided"),
        (0.1, 0.9, "better", "contradicted"),  # a difference, but too small to matter
        (-3.0, -1.0, "better", "contradicted"),
        (-0.5, 3.0, "at-least", "supported"),
        (-1.5, 3.0, "at-least", "not decided"),
        (-3.0, -1.1, "at-least", "contradicted"),
        (-0.5, 0.9, "same", "supported"),
        (-0.5, 1.1, "same", "not decided"),
        (1.1, 2.0, "same", "contradicted"),
        (-math.inf, math.inf, "better", "not decided"),
    ],
)
def test_verdicts(low: float, high: float, relation: str, expected: str) -> None:
    assert verdict(Interval((low + high) / 2, low, high, 3), relation, 1.0) == expected


def test_nothing_paired_is_not_decided() -> None:
    assert verdict(None, "better", 1.0) == "not decided"
    with pytest.raises(ValueError, match="unknown relation"):
        verdict(Interval(0, 0, 0, 3), "worse", 1.0)


def test_wilson_is_statsmodels() -> None:
    assert wilson(9260, 10000) == pytest.approx((0.92070, 0.93097), abs=1e-5)  # the usual formula, by hand
    assert wilson(0, 10)[0] == 0
    assert wilson(10, 10)[1] == pytest.approx(1)
