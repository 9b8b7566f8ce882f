"""The batched engine against the plain decoder, which knows nothing of caches and batches."""

from __future__ import annotations

import pytest
import torch

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.serving.kv_cache import SlottedKvCache
from nvlm_deploy.serving.reference import DecodeReplay, ReferenceEngine, prompt_embeddings


@pytest.fixture(scope="module")
def decoder(random_checkpoint, tiny_spec):
    from nvlm_deploy.model.decoder import decoder_from_checkpoint

    return decoder_from_checkpoint(random_checkpoint, tiny_spec)


def engine_of(decoder, slots: int = 4, dtype=torch.float32) -> ReferenceEngine:
    return ReferenceEngine(decoder, SlottedKvCache(decoder.spec, slots=slots, max_seq_len=64, dtype=dtype))


def table_of(decoder, rows: int) -> torch.Tensor:
    return torch.randn(rows, decoder.spec.hidden_size, generator=torch.Generator().manual_seed(1)).bfloat16()


def plain_logits(decoder, ids: list[int], table=None) -> torch.Tensor:
    with torch.inference_mode():
        return decoder(prompt_embeddings(decoder, torch.tensor(ids), table)[None])[0, -1]


def close(found: torch.Tensor, expected: torch.Tensor, bound: float = 1e-4) -> bool:
    return float((found - expected).norm() / expected.norm()) < bound


def test_prefill_and_decoding_equal_the_plain_decoder(decoder) -> None:
    engine = engine_of(decoder)
    ids = [5, 17, 300]
    assert close(engine.prefill(2, ids, None), plain_logits(decoder, ids))
    for token in (9, 40, 41):
        ids.append(token)
        assert close(engine.decode([2], [token])[0], plain_logits(decoder, ids))


def test_visual_ids_take_rows_of_the_table(decoder) -> None:
    table = table_of(decoder, 6)
    ids = [3, *range(512, 518), 4]
    assert close(engine_of(decoder).prefill(0, ids, table), plain_logits(decoder, ids, table))
    embeddings = prompt_embeddings(decoder, torch.tensor([514, 4, 512]), table)
    assert torch.equal(embeddings[0], table[2].float())
    assert torch.equal(embeddings[1], decoder.embed(torch.tensor(4)))


def test_a_row_that_the_table_lacks_is_refused(decoder) -> None:
    with pytest.raises(NvlmError, match="row 6 of a prompt table with 6 rows"):
        engine_of(decoder).prefill(0, [518], table_of(decoder, 6))


@pytest.mark.parametrize("slots", [[0, 1, 2], [3, 1, 0]])
def test_sequences_of_different_lengths_decode_together(decoder, slots) -> None:
    engine = engine_of(decoder)
    prompts = {slot: [7 + slot] * (1 + 5 * number) for number, slot in enumerate(slots)}
    for slot, prompt in prompts.items():
        engine.prefill(slot, prompt, None)
    for token in (20, 21):
        logits = engine.decode(slots, [token + slot for slot in slots])
        for slot, row in zip(slots, logits, strict=True):
            prompts[slot].append(token + slot)
            assert close(row, plain_logits(decoder, prompts[slot]))


def test_a_sequence_has_the_same_bits_alone_and_among_others(decoder_folder) -> None:
    """With FP8 a last bit may become another code, and another answer. The decoder is the one that is served."""
    from nvlm_deploy.model.fused import fused
    from nvlm_deploy.model.reference import decoder_from_trtllm

    decoder = fused(decoder_from_trtllm(decoder_folder, torch.float32))
    tokens = [20, 33, 41]
    alone = engine_of(decoder)
    alone.prefill(0, [7] * 9, None)
    expected = [alone.decode([0], [token])[0] for token in tokens]
    together = engine_of(decoder)
    for slot, length in enumerate((9, 3, 20, 14)):
        together.prefill(slot, [7 + slot] * length, None)
    found = [together.decode([0, 1, 2, 3], [token, 5, 6, 7])[0] for token in tokens]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_reused_slot_knows_nothing_of_its_former_sequence(decoder) -> None:
    engine = engine_of(decoder)
    engine.prefill(0, [1] * 30, torch.full((4, decoder.spec.hidden_size), float("nan")))
    engine.prefill(1, [2] * 40, None)
    engine.cache.keys[0][0, :, :30] = float("nan")
    engine.cache.values[0][0, :, :30] = float("nan")
    engine.release(0)
    engine.prefill(0, [5, 6], None)
    assert close(engine.decode([0, 1], [7, 8])[0], plain_logits(decoder, [5, 6, 7]))


def test_a_bfloat16_cache_is_close(decoder) -> None:
    engine = engine_of(decoder, dtype=torch.bfloat16)
    engine.prefill(0, [5, 6, 7, 8], None)
    assert close(engine.decode([0], [9])[0], plain_logits(decoder, [5, 6, 7, 8, 9]), bound=2e-2)


def test_warming_up_leaves_nothing_behind(decoder) -> None:
    engine = engine_of(decoder)
    engine.warm_up()
    assert not any(cache.any() for cache in (*engine.cache.keys, *engine.cache.values))


@pytest.mark.parametrize("slots", [[0, 1, 2], [3, 1]])
def test_the_step_that_a_gpu_replays_equals_the_plain_decoder(decoder, slots) -> None:
    """Every slot over the whole cache, whoever is asked for: the arithmetic of the recorded step, on the CPU."""
    engine = engine_of(decoder)
    engine._replay = DecodeReplay(engine)
    prompts = {slot: [7 + slot] * (1 + 5 * number) for number, slot in enumerate(range(4))}
    for slot, prompt in prompts.items():
        engine.prefill(slot, prompt, None)
    for asked in (slots, [0, 1, 2, 3]):
        logits = engine.decode(asked, [20 + slot for slot in asked])
        for slot, row in zip(asked, logits, strict=True):
            prompts[slot].append(20 + slot)
            assert close(row, plain_logits(decoder, prompts[slot]))


@pytest.fixture(scope="module")
def fp8_cache_decoder(random_checkpoint, tiny_spec):
    """The random decoder, its keys and values in FP8; scales of other values than a power of two, and not equal."""
    from nvlm_deploy.model.decoder import decoder_from_checkpoint

    decoder = decoder_from_checkpoint(random_checkpoint, tiny_spec)
    for layer in decoder.model.layers:
        layer.self_attn.key_scale, layer.self_attn.value_scale = torch.tensor(0.013), torch.tensor(0.011)
    return decoder


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float32], ids=str)
def test_an_fp8_cache_answers_as_the_plain_decoder_with_the_same_scales(fp8_cache_decoder, decoder, dtype) -> None:
    engine = engine_of(fp8_cache_decoder, dtype=dtype)
    ids = [5, 17, 300]
    rounded, unrounded = plain_logits(fp8_cache_decoder, ids), plain_logits(decoder, ids)
    assert close(engine.prefill(2, ids, None), rounded)
    assert not close(rounded, unrounded, bound=1e-3), "the rounding would not be seen"
    assert close(rounded, unrounded, bound=0.2)
    for token in (9, 40, 41):
        ids.append(token)
        assert close(engine.decode([2], [token])[0], plain_logits(fp8_cache_decoder, ids))


def test_an_fp8_cache_takes_a_byte_for_each_value(fp8_cache_decoder) -> None:
    cache = engine_of(fp8_cache_decoder, dtype=torch.float8_e4m3fn).cache
    spec = fp8_cache_decoder.spec
    values = 2 * spec.layers * cache.slots * cache.max_seq_len * spec.kv_heads * spec.head_size
    assert sum(tensor.nbytes for tensor in (*cache.keys, *cache.values)) == values


def test_an_fp8_cache_of_a_decoder_without_scales_is_refused(decoder) -> None:
    with pytest.raises(NvlmError, match="no kv_cache_scaling_factor"):
        engine_of(decoder, dtype=torch.float8_e4m3fn)
