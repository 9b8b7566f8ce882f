"""Batched greedy decoding against the plainest loop there is: one prompt, no padding, no cache."""

from __future__ import annotations

import pytest
import torch

from nvlm_deploy.model.decoder import Decoder
from nvlm_deploy.model.spec import DecoderSpec
from nvlm_deploy.validate.in_process import greedy

SPEC = DecoderSpec(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    layers=2,
    heads=4,
    kv_heads=2,
    norm_epsilon=1e-6,
    rotary_base=1e6,
    max_positions=128,
)
NO_END = -1


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(SPEC).requires_grad_(False).eval()
    for weight in decoder.parameters():
        if weight.ndim == 2:
            weight.normal_(std=0.3)
    return decoder


@pytest.fixture(scope="module")
def prompts(decoder: Decoder) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [decoder.embed(torch.randint(64, (length,), generator=generator)) for length in (9, 3, 14, 3, 1)]


def one_by_one(decoder: Decoder, prompt: torch.Tensor, tokens: int) -> list[int]:
    embeddings, found = prompt[None], []
    for _ in range(tokens):
        found.append(int(decoder(embeddings)[0, -1].argmax()))
        embeddings = torch.cat([embeddings, decoder.embed(torch.tensor([[found[-1]]]))], dim=1)
    return found


def test_a_batch_of_different_lengths_answers_as_each_prompt_alone(
    decoder: Decoder, prompts: list[torch.Tensor]
) -> None:
    batched = greedy(decoder, prompts, end_ids=[NO_END], max_tokens=10)
    assert batched == [one_by_one(decoder, prompt, 10) for prompt in prompts]


def test_any_end_id_ends_a_row_and_is_left_out(decoder: Decoder, prompts: list[torch.Tensor]) -> None:
    free = greedy(decoder, prompts, end_ids=[NO_END], max_tokens=10)
    ends = [free[2][4], free[0][6]]
    ended = greedy(decoder, prompts, end_ids=ends, max_tokens=10)
    first_ends = [min([answer.index(end) for end in ends if end in answer], default=10) for answer in free]
    assert ended == [answer[:first] for answer, first in zip(free, first_ends, strict=True)]


def test_max_tokens_bounds_every_row(decoder: Decoder, prompts: list[torch.Tensor]) -> None:
    assert [len(answer) for answer in greedy(decoder, prompts, end_ids=[NO_END], max_tokens=1)] == [1] * 5
