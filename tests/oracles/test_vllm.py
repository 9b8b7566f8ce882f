"""The whole small model against vLLM's own NVLM-D on the CPU: prompt ids, log-probabilities, text.

Needs the environment of `make oracle-vllm`; it is not part of `make test`.
"""

from __future__ import annotations

import pytest
from oracle_answers import IMAGES, MODEL, TEXTS, Answer, differing, logprob_differences, our_answers, vllm_answers

from nvlm_deploy.samples import Sample

LOGPROB_TOLERANCE = 1e-2


@pytest.fixture(scope="module")
def theirs(samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> list[Answer]:
    return vllm_answers(MODEL, samples, tmp_path_factory.mktemp("vllm"))


@pytest.fixture(scope="module")
def ours(samples: list[Sample]) -> list[Answer]:
    return our_answers(MODEL, samples)


def test_prompt_ids_are_equal_for_every_image_size_and_for_text(ours: list[Answer], theirs: list[Answer]) -> None:
    assert len(ours) == len(theirs) == IMAGES + TEXTS
    assert [mine.prompt_ids for mine in ours] == [other.prompt_ids for other in theirs]


def test_greedy_text_is_equal_for_99_of_100(ours: list[Answer], theirs: list[Answer]) -> None:
    different = differing(ours, theirs)
    assert len(different) <= len(ours) // 100, f"different answers at {different}"
    assert all(a.text.strip() == b.text.strip() for a, b in zip(ours, theirs, strict=True) if a.ids == b.ids)


def test_log_probabilities_agree_within_a_hundredth(ours: list[Answer], theirs: list[Answer]) -> None:
    worst = max(logprob_differences(ours, theirs))
    equal = len(ours) - len(differing(ours, theirs))
    print(f"\n{equal} of {len(ours)} answers equal, largest log-probability difference {worst:.2e}")
    assert worst < LOGPROB_TOLERANCE
