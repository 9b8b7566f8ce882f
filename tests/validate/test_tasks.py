"""Right and wrong answers, counted by task and compared in pairs."""

from __future__ import annotations

import pytest

from nvlm_deploy.errors import NvlmError
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


def test_a_drop_of_exactly_the_bound_is_allowed_and_more_is_not() -> None:
    samples = [Sample(question=str(number), answer="1") for number in range(200)]
    right, two_wrong, three_wrong = (scored(samples, ["0"] * wrong + ["1"] * (200 - wrong)) for wrong in (0, 2, 3))
    assert drop_verdict(Comparison(right, two_wrong), max_drop_points=1.0).holds
    assert not drop_verdict(Comparison(right, three_wrong), max_drop_points=1.0).holds


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
