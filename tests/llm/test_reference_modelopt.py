"""The reference decoder against ModelOpt's fake-quantised model where that has per-token scales or an FP8 KV cache.

FP8 with a 16-bit cache is in test_modelopt.py. On ModelOpt's side transformers' Qwen2 computes, and its quantisers fake
activations, keys and values. The weights are those of our checkpoint, which test_modelopt.py holds against ModelOpt's
exporter; ModelOpt's fake quantiser itself rounds ties of weights otherwise than its exporter.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from nvlm_deploy.checkpoint.trtllm_layout import FP8, FP8_PER_CHANNEL
from nvlm_deploy.llm.calibrate import CalibrationResult
from nvlm_deploy.llm.observed import FUSED_LINEARS
from nvlm_deploy.llm.trtllm import trtllm_checkpoint_from
from nvlm_deploy.model.decoder import Decoder, rotary_tables
from nvlm_deploy.model.reference import decoder_from_trtllm

# importing ModelOpt alone takes 10 s
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kv_cache", [None, FP8], ids=["16-bit cache", "FP8 cache"])
@pytest.mark.parametrize("quant_algo", [FP8, FP8_PER_CHANNEL])
def test_logits_are_those_of_modelopts_fake_quantised_model(
    case: Any, calibration: CalibrationResult, tmp_path: Path, quant_algo: str, kv_cache: str | None
) -> None:
    trtllm_checkpoint_from(
        case.checkpoint,
        case.spec,
        tmp_path / "d",
        calibration=calibration,
        quant_algo=quant_algo,
        kv_cache_quant_algo=kv_cache,
    )
    decoder = decoder_from_trtllm(tmp_path / "d")
    peer = faked(case, decoder, quant_algo)
    found = cosines(case, decoder, peer)
    print("least cosine:", min(found))
    # scales per token and an FP8 cache together leave more values near a threshold; a random network makes much of each
    both = quant_algo == FP8_PER_CHANNEL and kv_cache
    assert min(found) > (0.9999 if not both else 0.9995 if case.trained else 0.99)
    require_equal_layers(case, decoder, peer)


def test_keys_and_values_have_modelopts_amax(case: Any, calibration: CalibrationResult) -> None:
    """As they enter the cache: keys behind the rotation."""
    peer = quantised(case, FP8, with_cache=True)
    for index, layer in enumerate(peer.model.layers):
        name = f"model.layers.{index}.self_attn"
        for ours, theirs in (("keys", "k_bmm_quantizer"), ("values", "v_bmm_quantizer")):
            amax = getattr(layer.self_attn, theirs).amax.item()
            assert calibration.amax[f"{name}.{ours}"] == pytest.approx(amax, rel=1e-4)


def test_scales_of_keys_and_values_that_differ_are_honoured(
    case: Any, calibration: CalibrationResult, tmp_path: Path
) -> None:
    """As a Hugging Face folder has them: amax / 448, not raised to 1, so that codes are used to the full."""
    trtllm_checkpoint_from(case.checkpoint, case.spec, tmp_path / "d", calibration=calibration)
    decoder = decoder_from_trtllm(tmp_path / "d")
    for index, layer in enumerate(decoder.model.layers):
        name = f"model.layers.{index}.self_attn"
        layer.self_attn.key_scale = torch.tensor(calibration.amax[f"{name}.keys"] / 448)
        layer.self_attn.value_scale = torch.tensor(calibration.amax[f"{name}.values"] / 448)
    peer = faked(case, decoder, FP8)
    assert min(cosines(case, decoder, peer)) > (0.9999 if case.trained else 0.999)
    require_equal_layers(case, decoder, peer)


def faked(case: Any, decoder: Decoder, quant_algo: str) -> Any:
    """ModelOpt's model with the decoder's weights and scales; its quantisers do the rest."""
    peer = quantised(case, quant_algo, with_cache=decoder.has_fp8_kv_cache)
    for layer, ours in zip(peer.model.layers, decoder.model.layers, strict=True):
        for name in (linear for group in FUSED_LINEARS for linear in group):
            theirs, mine = layer.get_submodule(name), ours.get_submodule(name)
            theirs.weight.data = mine.weight.float() * mine.weight_scale.reshape(-1, 1)
            theirs.weight_quantizer.disable()
            if mine.activation_scale is not None:
                theirs.input_quantizer.amax = 448 * mine.activation_scale
        if decoder.has_fp8_kv_cache:
            layer.self_attn.k_bmm_quantizer.amax = 448 * ours.self_attn.key_scale
            layer.self_attn.v_bmm_quantizer.amax = 448 * ours.self_attn.value_scale
    return peer


def quantised(case: Any, quant_algo: str, *, with_cache: bool) -> Any:
    import modelopt.torch.quantization as mtq

    chosen = {FP8: mtq.FP8_DEFAULT_CFG, FP8_PER_CHANNEL: mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG}[quant_algo]
    rules = [*chosen["quant_cfg"], *(mtq.FP8_KV_CFG["quant_cfg"] if with_cache else [])]

    def run_all(model: Any) -> None:
        for sample in case.samples:
            model(inputs_embeds=sample[None])

    # ModelOpt prints its progress and warns about the absent GPU
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        return mtq.quantize(case.peer(), {"quant_cfg": rules, "algorithm": "max"}, run_all)


@torch.no_grad()
def cosines(case: Any, decoder: Decoder, peer: Any) -> list[float]:
    """Of the logits, one per sample."""
    found = []
    for sample in case.samples:
        ours, theirs = decoder(sample[None]).double(), peer(inputs_embeds=sample[None]).logits.double()
        found.append(torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0).item())
    return found


@torch.no_grad()
def require_equal_layers(case: Any, decoder: Decoder, peer: Any) -> None:
    """Each layer by itself, given what ModelOpt's had: equal but for float32's rounding, which now and then takes a
    value across a threshold of e4m3, a step of 6 %. Such a step grows in the layers behind it.
    """
    errors = []
    for sample in case.samples:
        states = peer(inputs_embeds=sample[None], output_hidden_states=True).hidden_states
        rotary = rotary_tables(torch.arange(len(sample))[None], case.spec.decoder, torch.float32)
        # transformers gives the last layer's output behind the final norm only
        for layer, before, after in zip(decoder.model.layers[:-1], states, states[1:], strict=False):
            errors.append(((layer(before, rotary) - after).norm() / (after - before).norm()).item())
    print("layers' relative errors: median", sorted(errors)[len(errors) // 2], "largest", max(errors))
    assert sorted(errors)[len(errors) // 2] < 1e-5
    assert max(errors) < 0.05
