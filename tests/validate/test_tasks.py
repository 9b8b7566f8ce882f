"""Right and wrong answers, counted by task and compared in pairs."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.report.measurement import Outcome
from nvlm_deploy.report.statistics import Accuracy
from nvlm_deploy.samples import Sample
from nvlm_deploy.validate.accuracy import comparison_as_json, drop_verdict
from nvlm_deploy.validate.tasks import Comparison, accuracy_by_task, is_exact, scored

SAMPLES = [
    Sample(question="a", answer="3", task="tile"),
    Sample(question="b", answer="3 1", task="read"),
    Sample(question="c", answer="7", task="tile"),
    Sample(question="d", answer="19", task="text"),
]


@pytest.mark.parametrize(
    ("text", "is_right"), [("3 1", True), (" 3 1\n", True), ("3  1", False), ("31", False), ("", False)]
)
def test_only_white_space_around_an_answer_is_forgiven(text: str, is_right: bool) -> None:
    assert is_exact(text, "3 1") is is_right


def test_accuracy_is_counted_by_task_and_over_all() -> None:
    counts = accuracy_by_task(scored(SAMPLES, ["3", "3 1", "8", "20"]))
    assert list(counts) == ["tile", "read", "text", "all"]
    assert (counts["tile"], counts["read"], counts["all"]) == (Accuracy(1, 2), Accuracy(1, 1), Accuracy(2, 4))


def test_no_answers_are_an_error_not_a_perfect_score() -> None:
    with pytest.raises(NvlmError, match="no answers"):
        accuracy_by_task([])


def test_differences_are_paired_within_a_task() -> None:
    comparison = Comparison(scored(SAMPLES, ["3", "3 1", "8", "19"]), scored(SAMPLES, ["4", "3 1", "7", "18"]))
    assert comparison.differences["tile"].points == 0
    assert comparison.differences["text"].points == -100
    assert comparison.differences["all"].points == -25


def test_agreement_counts_equal_answers_right_or_wrong() -> None:
    comparison = Comparison(scored(SAMPLES, ["x", "3 1", "7", "19"]), scored(SAMPLES, ["x ", "3 1", "8", "19"]))
    assert comparison.agreement == Accuracy(3, 4)


def compared(total: int, wrong: int) -> Comparison:
    """A reference that is always right, and a candidate that answers some questions wrong."""
    samples = [Sample(question=str(number), answer="1") for number in range(total)]
    return Comparison(scored(samples, ["1"] * total), scored(samples, ["0"] * wrong + ["1"] * (total - wrong)))


@pytest.mark.parametrize(
    ("total", "wrong", "outcome"),
    [
        (12, 0, Outcome.UNDECIDED),  # nothing lost, which 12 questions would hardly show anyway
        (193, 0, Outcome.UNDECIDED),
        (194, 0, Outcome.HOLDS),
        (200, 2, Outcome.UNDECIDED),  # the bar itself
        (200, 3, Outcome.UNDECIDED),
        (800, 2, Outcome.HOLDS),
        (800, 4, Outcome.UNDECIDED),
        (800, 8, Outcome.UNDECIDED),
        (800, 18, Outcome.FAILS),
        (12, 6, Outcome.FAILS),
    ],
)
def test_a_bar_holds_only_where_the_whole_interval_does(total: int, wrong: int, outcome: Outcome) -> None:
    verdict = drop_verdict(compared(total, wrong), max_drop_points=1.0)
    assert verdict.outcome is outcome
    assert verdict.holds is (outcome is Outcome.HOLDS)


@pytest.mark.parametrize(("total", "wrong"), [(12, 0), (100, 0), (100, 2), (300, 1), (60, 1)])
def test_the_number_of_questions_that_decide_decides(total: int, wrong: int) -> None:
    """The same questions with the same answers, asked so many times."""
    verdict = drop_verdict(compared(total, wrong), max_drop_points=1.0)
    assert verdict.outcome is Outcome.UNDECIDED
    assert verdict.decisive_n is not None

    def outcome(times: int) -> Outcome:
        return drop_verdict(compared(times * total, times * wrong), max_drop_points=1.0).outcome

    assert outcome(math.ceil(verdict.decisive_n / total)) is not Outcome.UNDECIDED
    assert outcome((verdict.decisive_n - 1) // total) is Outcome.UNDECIDED


def test_no_number_of_questions_decides_a_loss_of_exactly_the_bar() -> None:
    assert drop_verdict(compared(200, 2), max_drop_points=1.0).decisive_n is None


@given(st.integers(1, 2000), st.integers(0, 60), st.integers(0, 60), st.floats(0, 5))
def test_what_holds_is_never_outside_the_bar_by_its_interval(total: int, gained: int, lost: int, bar: float) -> None:
    total += gained + lost
    samples = [Sample(question=str(number), answer="1") for number in range(total)]
    reference = scored(samples, ["0"] * gained + ["1"] * (total - gained))
    candidate = scored(samples, ["1"] * (total - lost) + ["0"] * lost)
    verdict = drop_verdict(Comparison(reference, candidate), max_drop_points=bar)
    low, high = verdict.measurement.interval or (math.nan, math.nan)
    assert verdict.holds is (high <= bar)
    assert (verdict.outcome is Outcome.FAILS) is (low > bar)
    document = verdict.as_json()
    assert document["holds"] is (document["verdict"] == "holds")
    assert ("n_needed" in document) is (document["verdict"] == "undecided")


def test_nothing_lost_is_zero_and_not_minus_zero() -> None:
    answers = scored(SAMPLES, ["3"] * 4)
    assert str(drop_verdict(Comparison(answers, answers), max_drop_points=1.0).measurement.value) == "0.0"


def test_a_candidate_that_is_better_passes() -> None:
    comparison = Comparison(scored(SAMPLES, [""] * 4), scored(SAMPLES, ["3", "3 1", "7", "19"]))
    verdict = drop_verdict(comparison, max_drop_points=0.0)
    assert verdict.holds
    assert verdict.measurement.value == -100


def test_the_comparison_is_json_by_task() -> None:
    comparison = Comparison(scored(SAMPLES, ["3", "", "", ""]), scored(SAMPLES, ["", "", "", "19"]))
    document = comparison_as_json(comparison)
    assert document["difference"]["all"] == {
        "n": 4,
        "points": 0.0,
        "interval_95_points": pytest.approx(list(comparison.differences["all"].interval_points)),
        "only_reference_right": 1,
        "only_candidate_right": 1,
    }
    assert document["agreement"]["right"] == 2
