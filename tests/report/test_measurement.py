"""Bars judge measurements."""

from __future__ import annotations

import math

import pytest

from nvlm_deploy.report.measurement import Bar, Measurement, Verdict, all_hold


def verdict(value: float, bar: Bar) -> Verdict:
    return Verdict(Measurement("accuracy, tile", value, "%", 150), bar)


@pytest.mark.parametrize(
    ("value", "bar", "holds"),
    [
        (97.0, Bar("at least", 97.0), True),
        (96.9, Bar("at least", 97.0), False),
        (1.0, Bar("at most", 1.0), True),
        (1.1, Bar("at most", 1.0), False),
        (math.nan, Bar("at most", 1.0), False),
        (math.nan, Bar("at least", 1.0), False),
    ],
)
def test_a_bar_holds_up_to_its_bound(value: float, bar: Bar, holds: bool) -> None:
    assert verdict(value, bar).holds is holds


def test_a_verdict_says_what_was_demanded() -> None:
    assert verdict(98.25, Bar("at least", 97)).as_json() == {
        "what": "accuracy, tile: at least 97 %",
        "value": 98.25,
        "bound": 97,
        "holds": True,
    }


def test_one_broken_bar_breaks_all() -> None:
    kept, broken = verdict(98, Bar("at least", 97)), verdict(96, Bar("at least", 97))
    assert all_hold([kept, kept])
    assert not all_hold([kept, broken])


def test_a_measurement_needs_a_known_evidence_level() -> None:
    with pytest.raises(ValueError, match="hearsay"):
        Measurement("x", 1, "ms", 1, evidence="hearsay")
