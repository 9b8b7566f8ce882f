"""The Hugging Face folder against NVIDIA's own exporter, ModelOpt 0.47 `export_hf_checkpoint`, on the CPU.

ModelOpt quantises transformers' Qwen2 with the small model's decoder; nothing of ours takes part on its side.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nvlm_deploy.checkpoint.trtllm_layout import FP8, FP8_PER_CHANNEL
from nvlm_deploy.llm.calibrate import CalibrationResult
from nvlm_deploy.llm.hf_checkpoint import hf_checkpoint_from
from nvlm_deploy.llm.observed import FUSED_LINEARS
from nvlm_deploy.model.decoder import PREFIX

# importing ModelOpt alone takes 10 s; the whole of NVLM-D is needed, not a decoder alone
pytestmark = [pytest.mark.slow, pytest.mark.parametrize("case", ["tiny"], indirect=True)]


def test_fed_the_same_amax_every_tensor_of_the_decoder_equals_modelopts_to_the_byte(case: Any, tmp_path: Path) -> None:
    """With an FP8 KV cache, and q, k, v and gate, up sharing their scales by ModelOpt's own function.

    ModelOpt's model and its `dtype` are float32, or it would divide in BF16 (the next test).
    """
    peer = quantised(case, "FP8 with cache", torch.float32)
    amax = amax_of(peer)
    share_fused_scales(peer)
    export(peer, tmp_path / "theirs")
    ours, theirs = write_ours(case, tmp_path, amax, FP8, FP8), in_bf16(tensors_of(tmp_path / "theirs"))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not same_bytes(ours[name], theirs[name])] == []
    require_same_documents(tmp_path)


def test_from_a_bf16_model_modelopts_codes_are_rounded_twice_and_ours_once(case: Any, tmp_path: Path) -> None:
    """It divides the BF16 weight by its scale in BF16 and rounds the quotient again: ties that are none."""
    peer = quantised(case, "FP8", torch.bfloat16)
    amax = amax_of(peer)
    share_fused_scales(peer)
    export(peer, tmp_path / "theirs")
    ours, theirs = write_ours(case, tmp_path, amax, FP8, None), tensors_of(tmp_path / "theirs")
    weights, differing, total = case.weights(), 0, 0
    assert ours.keys() == theirs.keys()
    for name in ours:
        if ours[name].dtype != torch.float8_e4m3fn:
            assert same_bytes(ours[name], theirs[name]), name
            continue
        scale = ours[name + "_scale"]
        twice = (weights[name] / scale).to(torch.float8_e4m3fn)
        assert same_bytes(twice, theirs[name]), name
        exact, mine, other = weights[name].double() / scale.double(), ours[name].double(), theirs[name].double()
        assert bool(((mine - exact).abs() <= (other - exact).abs() + 1e-6 * exact.abs()).all()), "ours is the nearer"
        differing, total = differing + int((mine != other).sum()), total + mine.numel()
    print(f"{differing} of {total} codes differ, {differing / total:.2%}")
    assert 0 < differing < 0.05 * total


def test_per_channel_every_tensor_of_the_decoder_equals_modelopts_to_the_byte(case: Any, tmp_path: Path) -> None:
    export(quantised(case, "FP8 per channel", torch.bfloat16), tmp_path / "theirs")
    ours, theirs = write_ours(case, tmp_path, None, FP8_PER_CHANNEL, None), tensors_of(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not same_bytes(ours[name], theirs[name])] == []
    require_same_documents(tmp_path)


def test_left_alone_modelopt_differs_only_in_that_fused_linears_do_not_share_a_weight_scale(
    case: Any, tmp_path: Path
) -> None:
    """Engines requantise those with the larger scale when they fuse them, from codes that were rounded once already."""
    peer = quantised(case, "FP8", torch.float32)
    amax = amax_of(peer)
    export(peer, tmp_path / "theirs")
    ours, theirs = write_ours(case, tmp_path, amax, FP8, None), in_bf16(tensors_of(tmp_path / "theirs"))
    assert ours.keys() == theirs.keys()
    differing = {name for name in ours if not same_bytes(ours[name], theirs[name])}
    fused = {linear for group in FUSED_LINEARS if len(group) > 1 for linear in group}
    assert differing
    for name in differing:
        layer, _, tensor = name.removeprefix("model.layers.").partition(".")
        linear, _, kind = tensor.rpartition(".")
        assert linear in fused
        assert kind in ("weight", "weight_scale")
        scale = f"model.layers.{layer}.{linear}.weight_scale"
        assert ours[scale] > theirs[scale], "the larger one of the group"


def write_ours(
    case: Any, folder: Path, amax: CalibrationResult | None, quant_algo: str, kv_cache_quant_algo: str | None
) -> dict[str, torch.Tensor]:
    """The decoder's tensors by the names that a decoder alone has."""
    return hf_checkpoint_from(
        case.checkpoint,
        case.spec,
        folder / "ours",
        calibration=amax,
        quant_algo=quant_algo,
        kv_cache_quant_algo=kv_cache_quant_algo,
    ).tensors(PREFIX)


def require_same_documents(folder: Path) -> None:
    """Ours name the decoder within NVLM-D, and the encoder and the projector besides."""
    documents = {}
    for side in ("ours", "theirs"):
        quant = json.loads((folder / side / "hf_quant_config.json").read_text())
        config = json.loads((folder / side / "config.json").read_text())["quantization_config"]
        documents[side] = (quant["quantization"].pop("exclude_modules"), config.pop("ignore"), quant, config)
    ours, theirs = documents["ours"], documents["theirs"]
    assert ours[2:] == theirs[2:]
    assert ours[0] == ours[1] == [*(PREFIX + name for name in theirs[0]), "mlp1*", "vision_model*"]
    assert theirs[0] == theirs[1]


def quantised(case: Any, kind: str, dtype: torch.dtype) -> Any:
    """transformers' Qwen2, calibrated by ModelOpt over the case's samples."""
    import modelopt.torch.quantization as mtq

    cache = mtq.FP8_KV_CFG["quant_cfg"]
    configs = {
        "FP8": lambda: mtq.FP8_DEFAULT_CFG,
        "FP8 with cache": lambda: mtq.utils.update_quant_cfg_with_kv_cache_quant(
            copy.deepcopy(mtq.FP8_DEFAULT_CFG), cache
        ),
        "FP8 per channel": lambda: mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG,
    }

    def run_all(model: Any) -> None:
        for sample in case.samples:
            model(inputs_embeds=sample[None].to(dtype))

    with quiet():
        return mtq.quantize(case.peer(dtype), configs[kind](), run_all)


def amax_of(peer: Any) -> CalibrationResult:
    """ModelOpt's own amax, in our terms."""
    amax = {}
    for index, layer in enumerate(peer.model.layers):
        name = f"model.layers.{index}"
        for group in FUSED_LINEARS:
            amax[f"{name}.{group[0]}.input"] = layer.get_submodule(group[0]).input_quantizer.amax.item()
            for linear in group:
                amax[f"{name}.{linear}.weight"] = layer.get_submodule(linear).weight_quantizer.amax.item()
        for which, quantizer in (("keys", "k_bmm_quantizer"), ("values", "v_bmm_quantizer")):
            if getattr(layer.self_attn, quantizer).is_enabled:
                amax[f"{name}.self_attn.{which}"] = getattr(layer.self_attn, quantizer).amax.item()
    return CalibrationResult(amax, 1, 1)


def share_fused_scales(peer: Any) -> None:
    from modelopt.torch.export.quant_utils import preprocess_linear_fusion

    for layer in peer.model.layers:
        for group in FUSED_LINEARS:
            preprocess_linear_fusion([layer.get_submodule(linear) for linear in group])


def export(model: Any, folder: Path) -> None:
    from modelopt.torch.export import export_hf_checkpoint

    with quiet():
        export_hf_checkpoint(model, dtype=model.lm_head.weight.dtype, export_dir=folder)


@contextlib.contextmanager
def quiet() -> Any:
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


def in_bf16(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Norms, biases, embeddings and head, which a float32 model's export has in float32."""
    return {
        name: value.bfloat16() if value.dtype == torch.float32 and not name.endswith("_scale") else value
        for name, value in tensors.items()
    }


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
