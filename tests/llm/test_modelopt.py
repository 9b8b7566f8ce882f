"""The written checkpoint against NVIDIA's own exporter, ModelOpt 0.47 `export_tensorrt_llm_checkpoint`, on the CPU.

ModelOpt quantises transformers' Qwen2 with the same weights and exports it; nothing of ours takes part on its side.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nvlm_deploy.checkpoint.trtllm import read_checkpoint
from nvlm_deploy.checkpoint.trtllm_layout import FP8, FP8_PER_CHANNEL, Parallelism, rank_file
from nvlm_deploy.llm.calibrate import CalibrationResult, calibrate
from nvlm_deploy.llm.observed import FUSED_LINEARS
from nvlm_deploy.llm.trtllm import trtllm_checkpoint_from
from nvlm_deploy.model.reference import decoder_from_trtllm

# importing ModelOpt alone takes 10 s
pytestmark = pytest.mark.slow

SPLITS = [Parallelism(1), Parallelism(2), Parallelism(4), Parallelism(2, 2)]


def split_name(parallelism: Parallelism) -> str:
    return f"tp{parallelism.tensor}pp{parallelism.pipeline}"


@pytest.fixture(scope="module")
def quantised_peer(case: Any) -> Any:
    """transformers' Qwen2 in float32, calibrated and fake-quantised by ModelOpt over the same samples."""
    return calibrated_peer(case, torch.float32)


@pytest.fixture(scope="module")
def modelopt_amax(quantised_peer: Any, case: Any) -> CalibrationResult:
    """ModelOpt's own amax, in our terms; read before its export equalises the fused weights."""
    amax = {}
    for index, layer in enumerate(quantised_peer.model.layers):
        for group in FUSED_LINEARS:
            inputs = {layer.get_submodule(linear).input_quantizer.amax.item() for linear in group}
            assert len(inputs) == 1, "linears that see one input have one amax"
            amax[f"model.layers.{index}.{group[0]}.input"] = inputs.pop()
            for linear in group:
                weight = layer.get_submodule(linear).weight_quantizer.amax
                amax[f"model.layers.{index}.{linear}.weight"] = weight.item()
    return CalibrationResult(amax, len(case.samples), sum(map(len, case.samples)))


@pytest.fixture(scope="module")
def exported(quantised_peer: Any, modelopt_amax: CalibrationResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ModelOpt's export for each split; `modelopt_amax` comes first, as the export changes the model."""
    folder = tmp_path_factory.mktemp("modelopt")
    for parallelism in SPLITS:
        export(quantised_peer, folder / split_name(parallelism), parallelism)
    return folder


@pytest.mark.parametrize("parallelism", SPLITS, ids=split_name)
def test_fed_the_same_amax_every_tensor_equals_modelopts_to_the_byte(
    case: Any, modelopt_amax: CalibrationResult, exported: Path, tmp_path: Path, parallelism: Parallelism
) -> None:
    trtllm_checkpoint_from(
        case.checkpoint, case.spec, tmp_path / "ours", calibration=modelopt_amax, parallelism=parallelism
    )
    require_same_ranks(tmp_path / "ours", exported / split_name(parallelism), parallelism)


@pytest.mark.parametrize("parallelism", SPLITS, ids=split_name)
def test_per_channel_every_tensor_equals_modelopts_to_the_byte(
    four_key_heads_case: Any, tmp_path: Path, parallelism: Parallelism
) -> None:
    """Neither side has a calibration: the weights say it all."""
    export(per_channel_peer(four_key_heads_case), tmp_path / "theirs", parallelism)
    write_per_channel(four_key_heads_case, tmp_path / "ours", parallelism)
    require_same_ranks(tmp_path / "ours", tmp_path / "theirs", parallelism)
    ours, theirs = (json.loads((tmp_path / side / "config.json").read_text()) for side in ("ours", "theirs"))
    assert ours["quantization"] == theirs["quantization"]


@pytest.mark.parametrize("parallelism", [SPLITS[0], SPLITS[1]], ids=split_name)
def test_per_channel_where_ranks_share_a_key_head_modelopt_has_no_export_and_ours_equals_its_smaller_split(
    case: Any, tmp_path: Path, parallelism: Parallelism
) -> None:
    """Two key heads on four ranks: ModelOpt does not repeat a scale with its head."""
    assert case.spec.decoder.kv_heads == 2
    peer = per_channel_peer(case)
    with pytest.raises(NotImplementedError, match="Duplicating KV heads per-channel scales is not supported"):
        export(copy.deepcopy(peer), tmp_path / "refused", Parallelism(4))
    export(peer, tmp_path / "theirs", parallelism)
    write_per_channel(case, tmp_path / "ours", parallelism)
    require_same_ranks(tmp_path / "ours", tmp_path / "theirs", parallelism)
    whole = read_checkpoint(tmp_path / "ours").merged()
    write_per_channel(case, tmp_path / "four", Parallelism(4))
    merged = read_checkpoint(tmp_path / "four").merged()
    assert [name for name in whole if not same_bytes(whole[name], merged[name])] == []


def test_with_an_fp8_kv_cache_every_tensor_equals_modelopts_to_the_byte(
    case: Any, modelopt_amax: CalibrationResult, calibration: CalibrationResult, tmp_path: Path
) -> None:
    import modelopt.torch.quantization as mtq

    with_cache = copy.deepcopy(mtq.FP8_DEFAULT_CFG)
    with_cache["quant_cfg"] += mtq.FP8_KV_CFG["quant_cfg"]
    export(calibrated_peer(case, torch.float32, with_cache), tmp_path / "theirs", Parallelism(2))
    trtllm_checkpoint_from(
        case.checkpoint,
        case.spec,
        tmp_path / "ours",
        calibration=dataclasses.replace(modelopt_amax, amax={**calibration.amax, **modelopt_amax.amax}),
        parallelism=Parallelism(2),
        kv_cache_quant_algo=FP8,
    )
    # it also writes the two that TensorRT-LLM's reader would merge into the one (contract A.7)
    require_same_ranks(
        tmp_path / "ours",
        tmp_path / "theirs",
        Parallelism(2),
        besides=("attention.k_cache_scaling_factor", "attention.v_cache_scaling_factor"),
    )
    ours, theirs = (json.loads((tmp_path / side / "config.json").read_text()) for side in ("ours", "theirs"))
    assert ours["quantization"] == theirs["quantization"]


@pytest.mark.parametrize("parallelism", SPLITS, ids=split_name)
def test_unquantised_every_tensor_equals_modelopts_to_the_byte(
    case: Any, tmp_path: Path, parallelism: Parallelism
) -> None:
    export(case.peer(), tmp_path / "theirs", parallelism)
    trtllm_checkpoint_from(case.checkpoint, case.spec, tmp_path / "ours", calibration=None, parallelism=parallelism)
    require_same_ranks(tmp_path / "ours", tmp_path / "theirs", parallelism)


@pytest.mark.parametrize("theirs_in", [torch.float32, torch.bfloat16], ids=["theirs float32", "theirs bfloat16"])
@pytest.mark.parametrize("ours_in", [torch.float32, torch.bfloat16], ids=["ours float32", "ours bfloat16"])
def test_calibrated_apart_activation_scales_are_within_two_percent_and_weight_bytes_equal(
    case: Any, tmp_path: Path, ours_in: torch.dtype, theirs_in: torch.dtype
) -> None:
    """Both sides run their own layers over the same samples. A small model's layers are float32 with us by default."""
    export(calibrated_peer(case, theirs_in), tmp_path / "theirs", Parallelism())
    calibration = calibrate(case.checkpoint, case.spec, case.samples, dtype=ours_in)
    trtllm_checkpoint_from(case.checkpoint, case.spec, tmp_path / "ours", calibration=calibration)
    ours, theirs = (load_file(tmp_path / side / rank_file(0)) for side in ("ours", "theirs"))
    scales = {name for name in ours if name.endswith("activation_scaling_factor")}
    assert len(scales) == 5 * case.spec.decoder.layers
    off = max(((ours[name] / theirs[name] - 1).abs().item(), name) for name in scales)
    print("activation scales off by at most", off)
    assert off[0] < (1e-5 if ours_in == theirs_in == torch.float32 else 0.02), off
    assert [name for name in ours if name not in scales and not same_bytes(ours[name], theirs[name])] == []


def test_config_json_differs_from_modelopts_only_where_the_contract_wants_it(
    case: Any, exported: Path, modelopt_amax: CalibrationResult, tmp_path: Path
) -> None:
    """Without tensorrt_llm ModelOpt writes a config.json that `trtllm-build` cannot read (contract A.3)."""
    trtllm_checkpoint_from(case.checkpoint, case.spec, tmp_path / "ours", calibration=modelopt_amax)
    ours = json.loads((tmp_path / "ours" / "config.json").read_text())
    theirs = json.loads((exported / "tp1pp1" / "config.json").read_text())

    # ModelOpt's notes to itself, which TensorRT-LLM's reader ignores
    assert theirs.keys() - ours.keys() == {
        *("producer", "decoder", "bias", "rmsnorm", "rank", "residual_mlp", "lm_head_bias", "rotary_pct"),
        "share_embedding_table",
    }
    # no default at all (qwen_type, seq_length), a default that is wrong for Qwen2 (rotary_base), or said for clarity
    assert ours.keys() - theirs.keys() == {
        *("qwen_type", "seq_length", "rotary_base", "rotary_scaling", "rotary_embedding_dim", "attn_bias", "mlp_bias"),
        *("use_logn_attn", "disable_weight_only_quant_plugin", "num_labels", "qk_layernorm", "tie_word_embeddings"),
    }
    differing = {key: (ours[key], theirs[key]) for key in ours.keys() & theirs.keys() if ours[key] != theirs[key]}
    # float16 logits would round the BF16 model's, and can overflow
    assert differing.pop("logits_dtype") == ("float32", "float16")
    # ours says the two sizes that are defaults
    mapping = differing.pop("mapping")
    assert mapping[0] == mapping[1] | {"cp_size": 1, "gpus_per_node": 8}
    assert differing == {}
    assert ours["quantization"] == {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}


def test_the_reference_decoder_computes_what_modelopts_fake_quantised_model_computes(
    case: Any, quantised_peer: Any, modelopt_amax: CalibrationResult, exported: Path, tmp_path: Path
) -> None:
    """ModelOpt's model, faking activations itself, with the weights that ModelOpt's exporter writes.

    Over real prompts an activation may lie at a rounding tie, which the two sides' scales take either way.
    """
    decoder = reference(case, modelopt_amax, tmp_path)
    peer = copy.deepcopy(quantised_peer)
    written = exported_weights(exported)
    for name, linear in linears(peer):
        linear.weight.data = weight_of(name, written, case)
        linear.weight_quantizer.disable()
    assert min(cosines(case, decoder, peer)) > (0.9999 if case.trained else 0.999999)


def test_modelopts_faked_weights_differ_from_its_exported_ones_at_rounding_ties_only(
    case: Any, quantised_peer: Any, modelopt_amax: CalibrationResult, exported: Path, tmp_path: Path
) -> None:
    """Its fake quantiser multiplies by 448 / amax, its exporter divides by amax / 448: a tie may fall either way.

    BF16 weights over a BF16 amax with few bits make ties likely, and a random network makes much of each.
    """
    decoder = reference(case, modelopt_amax, tmp_path)
    peer = copy.deepcopy(quantised_peer)
    share_fused_scales(peer)
    written = exported_weights(exported)
    ties = total = 0
    for name, linear in linears(peer):
        faked, scale = linear.weight_quantizer(linear.weight).detach(), linear.weight_quantizer.amax / 448
        theirs = weight_of(name, written, case)
        differs = (faked - theirs).abs() > 1e-5 * faked.abs()
        middle = (faked + theirs)[differs] / 2
        torch.testing.assert_close(linear.weight[differs], middle, rtol=1e-5, atol=1e-6 * scale.item())
        ties, total = ties + int(differs.sum()), total + differs.numel()
    found = cosines(case, decoder, peer)
    print(f"{ties} ties among {total} weights; cosines of logits with ties as they fall:", found)
    assert ties < 0.005 * total
    assert min(found) > (0.9999 if case.trained else 0.99)


def reference(case: Any, calibration: CalibrationResult, folder: Path) -> Any:
    return decoder_from_trtllm(
        trtllm_checkpoint_from(case.checkpoint, case.spec, folder / "ours", calibration=calibration)
    )


def linears(peer: Any) -> Any:
    """(name, module) of every linear of every layer."""
    for index in range(len(peer.model.layers)):
        for group in FUSED_LINEARS:
            for linear in group:
                yield f"model.layers.{index}.{linear}", peer.get_submodule(f"model.layers.{index}.{linear}")


def exported_weights(exported: Path) -> dict[str, torch.Tensor]:
    """Linear -> its weight as ModelOpt exported it, dequantised. Query, key and value rows have equal scales."""
    tensors = load_file(exported / "tp1pp1" / rank_file(0))
    weights = {}
    for name, codes in tensors.items():
        if codes.dtype == torch.float8_e4m3fn:
            module = name.removesuffix(".weight")
            layer, kind = module.removeprefix("transformer.layers.").split(".", 1)
            weights[f"model.layers.{layer}.{kind}"] = codes.float() * tensors[f"{module}.weights_scaling_factor"]
    return weights


def weight_of(name: str, weights: dict[str, torch.Tensor], case: Any) -> torch.Tensor:
    """A linear's rows of its tensor in TensorRT-LLM's naming; `fc` is what SiLU acts on."""
    layer, linear = name.split(".self_attn.")[0].split(".mlp.")[0], name.rsplit(".", 1)[1]
    if linear in ("q_proj", "k_proj", "v_proj"):
        decoder = case.spec.decoder
        rows = [heads * decoder.head_size for heads in (decoder.heads, decoder.kv_heads, decoder.kv_heads)]
        return weights[f"{layer}.attention.qkv"].split(rows)["qkv".index(linear[0])]
    kinds = {"o_proj": "attention.dense", "gate_proj": "mlp.fc", "up_proj": "mlp.gate", "down_proj": "mlp.proj"}
    return weights[f"{layer}.{kinds[linear]}"]


def share_fused_scales(peer: Any) -> None:
    """What ModelOpt's exporter does to the scales of q, k and v on their way out, done to the model itself."""
    from modelopt.torch.export.quant_utils import preprocess_linear_fusion

    for layer in peer.model.layers:
        for group in FUSED_LINEARS:
            preprocess_linear_fusion([layer.get_submodule(linear) for linear in group])


@torch.no_grad()
def cosines(case: Any, decoder: Any, peer: Any) -> list[float]:
    """Of the logits, one per sample."""
    found = []
    for sample in case.samples:
        ours, theirs = decoder(sample[None]).double(), peer(inputs_embeds=sample[None]).logits.double()
        found.append(torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0).item())
    return found


def calibrated_peer(case: Any, dtype: torch.dtype, config: Any = None) -> Any:
    import modelopt.torch.quantization as mtq

    def run_all(model: Any) -> None:
        for sample in case.samples:
            model(inputs_embeds=sample[None].to(dtype))

    with quiet():
        return mtq.quantize(case.peer(dtype), config or mtq.FP8_DEFAULT_CFG, run_all)


def export(model: Any, folder: Path, parallelism: Parallelism) -> None:
    from modelopt.torch.export import export_tensorrt_llm_checkpoint

    with quiet():
        export_tensorrt_llm_checkpoint(
            model,
            "qwen",
            torch.bfloat16,
            folder,
            inference_tensor_parallel=parallelism.tensor,
            inference_pipeline_parallel=parallelism.pipeline,
        )


@contextlib.contextmanager
def quiet() -> Any:
    """ModelOpt prints its progress and warns about the absent tensorrt_llm."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def per_channel_peer(case: Any) -> Any:
    import modelopt.torch.quantization as mtq

    with quiet():
        return mtq.quantize(case.peer(), mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG)


def write_per_channel(case: Any, folder: Path, parallelism: Parallelism) -> None:
    trtllm_checkpoint_from(
        case.checkpoint, case.spec, folder, calibration=None, quant_algo=FP8_PER_CHANNEL, parallelism=parallelism
    )


def require_same_ranks(ours: Path, theirs: Path, parallelism: Parallelism, besides: tuple[str, ...] = ()) -> None:
    """All tensors of all ranks; `besides` are theirs alone."""
    for rank in range(parallelism.world_size):
        mine, peers = (load_file(folder / rank_file(rank)) for folder in (ours, theirs))
        peers = {name: value for name, value in peers.items() if not name.endswith(besides or "no such tensor")}
        assert {name: (value.dtype, value.shape) for name, value in mine.items()} == {
            name: (value.dtype, value.shape) for name, value in peers.items()
        }
        assert [name for name in mine if not same_bytes(mine[name], peers[name])] == []


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))
