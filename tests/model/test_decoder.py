"""The decoder against transformers' Qwen2ForCausalLM."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.model.decoder import PREFIX, Decoder, decoder_from_checkpoint
from nvlm_deploy.model.spec import spec_from_checkpoint

TOKENS = 300  # far enough for a wrong rotary base to show


def qwen2(spec, weights):
    """transformers' own model on our weights."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        rms_norm_eps=spec.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": spec.rotary_base},
        max_position_embeddings=spec.max_positions,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    model = Qwen2ForCausalLM(config).eval().requires_grad_(False)
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, strict=True)
    return model


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def spec(random_checkpoint):
    return spec_from_checkpoint(random_checkpoint)


@pytest.fixture(scope="module")
def decoder(random_checkpoint, spec):
    return decoder_from_checkpoint(random_checkpoint, spec)


@pytest.fixture(scope="module")
def oracle(random_checkpoint, spec):
    return qwen2(spec.decoder, random_checkpoint.tensors(PREFIX))


@pytest.fixture(scope="module")
def ids(spec):
    return torch.randint(0, spec.decoder.vocab_size, (2, TOKENS), generator=torch.Generator().manual_seed(0))


def test_the_logits_equal_transformers_qwen2(decoder, oracle, ids, spec):
    assert (spec.decoder.heads, spec.decoder.kv_heads) == (8, 2)  # grouped queries are part of what is compared
    error = relative_error(decoder(decoder.embed(ids)), oracle(input_ids=ids).logits)
    print(f"logits: relative error {error:.1e}")
    assert error < 1e-4


def test_visual_embeddings_among_the_text_give_the_same_logits_too(decoder, oracle, ids):
    embeddings = decoder.embed(ids)
    embeddings[:, 10:50] = torch.randn(2, 40, embeddings.shape[-1], generator=torch.Generator().manual_seed(1))
    assert relative_error(decoder(embeddings), oracle(inputs_embeds=embeddings).logits) < 1e-4


@pytest.mark.parametrize("kv_heads", [1, 4, 8])
def test_other_groupings_of_the_heads_equal_transformers_too(spec, kv_heads, ids):
    small = replace(spec.decoder, kv_heads=kv_heads, layers=1)
    torch.manual_seed(kv_heads)
    decoder = Decoder(small).requires_grad_(False).eval()
    oracle = qwen2(small, decoder.state_dict())
    assert relative_error(decoder(decoder.embed(ids)), oracle(input_ids=ids).logits) < 1e-4


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj"])
def test_the_biases_of_q_k_and_v_are_used(decoder, ids, name):
    bias = getattr(decoder.model.layers[0].self_attn, name).bias
    before, saved = decoder(decoder.embed(ids[:, :20])), bias.clone()
    try:
        bias.add_(torch.linspace(-1, 1, len(bias)))
        assert relative_error(decoder(decoder.embed(ids[:, :20])), before) > 1e-3
    finally:
        bias.copy_(saved)


def test_the_checkpoints_parameter_names_are_qwen2s_own(decoder, oracle):
    assert set(decoder.state_dict()) == set(oracle.state_dict())
    biases = {name.split(".")[-2] for name in decoder.state_dict() if name.endswith("bias")}
    assert biases == {"q_proj", "k_proj", "v_proj"}


class GrowingCache:
    """Keys and values as they come."""

    def __init__(self) -> None:
        self.keys = self.values = None

    def update(self, keys, values):
        self.keys = keys if self.keys is None else torch.cat([self.keys, keys], dim=2)
        self.values = values if self.values is None else torch.cat([self.values, values], dim=2)
        return self.keys, self.values


def test_one_token_at_a_time_through_a_cache_equals_all_at_once(decoder, oracle, ids):
    caches = [GrowingCache() for _ in decoder.model.layers]
    first = decoder(decoder.embed(ids[:, :20]), caches=caches)
    steps = [first]
    for position in range(20, 24):
        here = torch.full((2, 1), position)
        mask = torch.ones(1, 1, 1, position + 1, dtype=torch.bool)
        embeddings = decoder.embed(ids[:, position : position + 1])
        steps.append(decoder(embeddings, positions=here, mask=mask, caches=caches))
    assert relative_error(torch.cat(steps, dim=1), oracle(input_ids=ids[:, :24]).logits) < 1e-4


def test_a_mask_lets_a_padded_row_equal_the_row_alone(decoder, ids):
    alone = decoder(decoder.embed(ids[:1, 5:20]))
    positions = torch.arange(20)[None] - 5
    mask = torch.ones(20, 20, dtype=torch.bool).tril()[None, None].clone()
    mask[..., 5:, :5] = False
    padded = decoder(decoder.embed(ids[:1, :20]), positions=positions.clamp(min=0), mask=mask)
    assert relative_error(padded[:, 5:], alone) < 1e-4


def test_a_missing_layer_tensor_is_named(make_checkpoint):
    name = "language_model.model.layers.0.self_attn.k_proj.bias"
    checkpoint = make_checkpoint(vision_layers=1, decoder_layers=1, edit=lambda weights: weights.pop(name))
    with pytest.raises(NvlmError, match=name.replace(".", r"\.")):
        decoder_from_checkpoint(checkpoint, spec_from_checkpoint(checkpoint))


def test_a_decoder_tensor_of_the_wrong_shape_is_named_with_both_shapes(make_checkpoint):
    def widen(weights) -> None:
        weights["language_model.lm_head.weight"] = torch.zeros(513, 256, dtype=torch.bfloat16)

    checkpoint = make_checkpoint(vision_layers=1, decoder_layers=1, edit=widen)
    with pytest.raises(NvlmError, match=r"lm_head.weight .*\[513, 256\], expected \[512, 256\]"):
        decoder_from_checkpoint(checkpoint, spec_from_checkpoint(checkpoint))
