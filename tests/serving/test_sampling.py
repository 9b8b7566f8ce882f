"""From logits to tokens."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.serving.sampling import Sampler, SamplingSettings

LOGITS = torch.tensor([1.0, 3.0, 2.0, 0.5])
ENDLESS = -1


def tokens(settings: SamplingSettings, count: int = 1, logits=LOGITS, *, prompt=(), end_id=ENDLESS, bad_words=()):
    sampler = Sampler(settings, prompt, end_id=end_id, bad_words=bad_words)
    return [sampler.next_token(logits) for _ in range(count)]


@pytest.mark.parametrize("settings", [SamplingSettings(), SamplingSettings(top_k=1, temperature=5)])
def test_greedy_takes_the_best_token(settings) -> None:
    assert tokens(settings, 3) == [1, 1, 1]


def test_top_k_draws_from_the_k_best_only() -> None:
    assert set(tokens(SamplingSettings(top_k=2, temperature=10), 200)) == {1, 2}


def test_top_p_draws_from_the_smallest_set_that_reaches_p() -> None:
    probabilities = LOGITS.softmax(0)
    p = float(probabilities[1] + probabilities[2]) - 1e-3
    assert set(tokens(SamplingSettings(top_p=p), 300)) == {1, 2}


def test_a_tiny_top_p_still_leaves_one_token() -> None:
    assert set(tokens(SamplingSettings(top_p=1e-6), 20)) == {1}


def test_frequencies_are_those_of_the_softmax() -> None:
    count = 4000
    found = Counter(tokens(SamplingSettings(top_p=1.0, temperature=2, seed=3), count))
    for token, probability in enumerate((LOGITS / 2).softmax(0).tolist()):
        deviation = math.sqrt(probability * (1 - probability) / count)
        assert abs(found[token] / count - probability) < 4 * deviation


def test_a_seed_repeats_and_another_differs() -> None:
    flat = torch.zeros(1000)
    draw = [tokens(SamplingSettings(top_p=1.0, seed=seed), 10, flat) for seed in (1, 1, 2, 2**64 - 1)]
    assert draw[0] == draw[1]
    assert draw[0] != draw[2] != draw[3]


def test_the_draw_does_not_depend_on_other_sequences() -> None:
    alone = tokens(SamplingSettings(top_p=1.0, seed=1), 5)
    one, other = (Sampler(SamplingSettings(top_p=1.0, seed=seed), (), end_id=ENDLESS) for seed in (1, 2))
    together = []
    for _ in range(5):
        together.append(one.next_token(LOGITS))
        other.next_token(LOGITS)
    assert together == alone


def test_repetition_penalty_counts_the_prompt_too_and_passes_over_visual_ids() -> None:
    assert tokens(SamplingSettings(repetition_penalty=2.0), prompt=(1, 99)) == [2]


def test_presence_and_frequency_penalties_count_the_answer() -> None:
    assert tokens(SamplingSettings(presence_penalty=1.5), 2) == [1, 2]
    assert tokens(SamplingSettings(frequency_penalty=0.6), 4) == [1, 1, 2, 1]


def test_the_end_is_impossible_before_min_tokens() -> None:
    assert tokens(SamplingSettings(min_tokens=2), 3, end_id=1) == [2, 2, 1]


def test_no_further_end_comes_before_min_tokens_either() -> None:
    sampler = Sampler(SamplingSettings(min_tokens=2), (), end_id=ENDLESS, further_ends=[1])
    assert [sampler.next_token(LOGITS) for _ in range(3)] == [2, 2, 1]


@pytest.mark.parametrize("end_id", [-1, 10**6])
def test_an_end_id_that_no_token_has_bans_none(end_id) -> None:
    assert tokens(SamplingSettings(min_tokens=2), 1, logits=LOGITS.flip(0), end_id=end_id) == tokens(
        SamplingSettings(), 1, logits=LOGITS.flip(0), end_id=end_id
    )


def test_a_bad_word_is_never_finished() -> None:
    assert tokens(SamplingSettings(), 2, bad_words=[(1,)]) == [2, 2]
    assert tokens(SamplingSettings(), 3, bad_words=[(1, 1)]) == [1, 2, 1]


def test_the_logits_of_the_caller_stay_as_they_are() -> None:
    before = LOGITS.clone()
    tokens(SamplingSettings(repetition_penalty=2.0, min_tokens=5), 3, prompt=(1,), end_id=2)
    assert torch.equal(LOGITS, before)


@pytest.mark.parametrize(
    ("name", "value", "word"),
    [
        ("temperature", 0.0, "temperature"),
        ("temperature", float("inf"), "finite"),
        ("top_k", 5000, "runtime_top_k"),
        ("top_p", -0.1, "runtime_top_p"),
        ("repetition_penalty", 0.0, "repetition_penalty"),
        ("min_tokens", -1, "min_tokens"),
        ("frequency_penalty", float("nan"), "frequency_penalty"),
    ],
)
def test_values_out_of_range_are_refused_by_name(name, value, word) -> None:
    with pytest.raises(NvlmError, match=word):
        SamplingSettings(**{name: value})
