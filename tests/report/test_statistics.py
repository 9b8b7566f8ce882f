"""Intervals and percentiles against scipy, numpy and published values."""

from __future__ import annotations

import math

import pytest
from scipy import stats

from nvlm_deploy.report.statistics import Accuracy, PairedDifference, paired_difference, percentiles, wilson_interval


@pytest.mark.parametrize(("right", "total"), [(0, 10), (10, 10), (15, 148), (588, 600), (1, 2)])
def test_wilsons_interval_is_scipys(right: int, total: int) -> None:
    expected = stats.binomtest(right, total).proportion_ci(0.95, method="wilson")
    assert wilson_interval(right, total) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilsons_interval_is_newcombes_published_one() -> None:
    """Newcombe 1998, table I: 81 of 263."""
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)


def test_an_accuracy_of_all_or_nothing_has_an_interval_inside_0_to_100() -> None:
    assert Accuracy(20, 20).interval_percent[1] == 100
    assert Accuracy(0, 20).interval_percent[0] == 0
    assert Accuracy(20, 20).interval_percent[0] < 90


@pytest.mark.parametrize(("right", "total"), [(1, 0), (3, 2), (-1, 2), (0, 0)])
def test_an_impossible_accuracy_is_refused(right: int, total: int) -> None:
    with pytest.raises(ValueError, match="right of"):
        Accuracy(right, total)


def test_a_paired_difference_counts_only_where_the_two_disagree() -> None:
    difference = paired_difference([True, True, False, False, True], [True, False, True, True, True])
    assert (difference.only_candidate, difference.only_reference, difference.total) == (2, 1, 5)
    assert difference.points == pytest.approx(20.0)


def test_a_candidate_that_loses_has_negative_points() -> None:
    assert paired_difference([True] * 100, [False] + [True] * 99).points == pytest.approx(-1.0)


def test_the_paired_interval_is_agresti_and_mins() -> None:
    """Adjusted Wald by hand: cells 12.5 and 4.5 of 102."""
    low, high = PairedDifference(12, 4, 100).interval_points
    half = 1.959964 * math.sqrt(17 / 102 - (8 / 102) ** 2) / math.sqrt(102)
    assert (low, high) == pytest.approx((100 * (8 / 102 - half), 100 * (8 / 102 + half)), abs=1e-4)


def test_two_that_always_agree_still_have_an_interval() -> None:
    low, high = PairedDifference(0, 0, 750).interval_points
    assert low < 0 < high < 0.5


def test_answers_must_be_to_the_same_questions() -> None:
    with pytest.raises(ValueError, match="is longer than"):
        paired_difference([True], [True, False])


def test_percentiles_are_milliseconds() -> None:
    found = percentiles([number / 1000 for number in range(1, 102)])
    assert (found.p50_ms, found.p95_ms, found.n) == (pytest.approx(51), pytest.approx(96), 101)
