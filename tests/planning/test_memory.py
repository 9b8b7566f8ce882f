"""The memory account: the released model's numbers, and that nothing called fitting ever exceeds the memory."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from nvlm_deploy.checkpoint.trtllm_layout import legal_tensor_parallel
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.model.spec import DecoderSpec
from nvlm_deploy.planning.known_models import PlannedModel, planned_model
from nvlm_deploy.planning.memory import decoder_activation_bytes, kv_bytes_per_token, memory_account, room_of
from nvlm_deploy.planning.plan import Plan, legal_splits, make_plan
from nvlm_deploy.planning.weights import layout_of, vision_engine_bytes, whole_decoder_bytes
from nvlm_deploy.profile import load_profile, profile_names
from nvlm_deploy.sku import load_sku, sku_names

GIB = 2**30
HOST = 64 * GIB
GPUS = [name for name in sku_names() if name != "cpu"]


def test_the_fp8_decoder_weighs_what_the_fact_sheet_says(released):
    weights = whole_decoder_bytes(layout_of(released.spec, load_profile("h100-sxm-80gb-throughput")))
    assert f"{weights.linears / GIB:.2f}" == "65.39"
    assert f"{weights.others / GIB:.2f}" == "4.64"


def test_a_cached_token_takes_what_the_fact_sheet_says(released):
    assert kv_bytes_per_token(released.spec.decoder, "16bit") == 327_680
    assert kv_bytes_per_token(released.spec.decoder, "fp8") == 163_840


def test_the_encoder_is_planned_without_its_dummy_heads(released):
    assert vision_engine_bytes(released.spec, "bf16") == 2 * (5_536_496_000 + 620_717_056)
    # what TensorRT-RTX made of it: plans of 12.33 and 6.82 GB (engines/EVIDENCE.md)
    assert vision_engine_bytes(released.spec, "bf16") == pytest.approx(12.33e9, rel=0.01)
    assert vision_engine_bytes(released.spec, "fp8") == pytest.approx(6.82e9, rel=0.01)


def test_activations_are_near_the_constants_of_nvidias_own_planner(released):
    """ai-dynamo/aiconfigurator: 11, 6.5, 5 and 5 hidden sizes of 2 bytes a token for 1, 2, 4 and 8 ranks."""
    for ranks, hidden_sizes in ((1, 11), (2, 6.5), (4, 5), (8, 5)):
        theirs = 2 * 8192 * released.spec.decoder.hidden_size * hidden_sizes
        assert decoder_activation_bytes(released.spec.decoder, 8192, ranks) == pytest.approx(theirs, rel=0.03)


def test_fp8_does_not_fit_one_80_gb_gpu_and_the_reason_has_both_numbers(released, profile_with):
    plan = make_plan(released, profile_with(decoder_tensor_parallel=1), HOST)
    assert not plan.memory.fits
    assert plan.memory.why_not.startswith("needs ")
    assert "on GPU 0 (81.5 of weights), 79.2 visible" in plan.memory.why_not


def test_fp8_fits_one_h200_and_two_h100(released):
    for name in ("h200-141gb-throughput", "h100-sxm-80gb-throughput"):
        assert make_plan(released, load_profile(name), HOST).memory.fits


def test_only_the_first_gpu_has_the_encoder(released):
    first, second = make_plan(released, load_profile("h100-sxm-80gb-throughput"), HOST).memory.gpus
    assert {line.name for line in first.lines} - {line.name for line in second.lines} == {
        "vision engine, BF16",
        "vision activations, 14 tiles",
        "tiles and embeddings in flight",
        "vision process, CUDA",
    }


def test_pipeline_stages_differ_in_weights_and_cache(released, profile_with):
    plan = make_plan(released, profile_with(decoder_tensor_parallel=1, decoder_pipeline_parallel=3), HOST)
    per_token = [gpu.kv_bytes_per_token for gpu in plan.memory.gpus]
    assert per_token == [27 * 4096, 27 * 4096, 26 * 4096]
    assert sum(per_token) == 327_680


def test_an_fp8_cache_holds_twice_the_tokens(released, profile_with):
    wide, narrow = (
        make_plan(released, profile_with(decoder_kv_cache=kind, decoder_max_batch_size=64), HOST).memory
        for kind in ("16bit", "fp8")
    )
    assert narrow.kv_tokens == pytest.approx(2 * wide.kv_tokens, abs=64)


def test_prompt_tables_grow_with_images_and_requests(released, profile_with):
    def table(**changes: int) -> int:
        plan = make_plan(released, profile_with(**changes), HOST)
        return next(line.size_bytes for line in plan.memory.gpus[0].lines if line.name == "prompt table of the engine")

    assert table(serving_max_images=1) * 2 == table(serving_max_images=2)
    assert table(serving_max_images=1, decoder_max_batch_size=8) == 8 * 7 * 256 * 8192 * 2


def test_a_host_takes_the_machines_memory(released):
    plan = make_plan(released, load_profile("cpu"), HOST)
    assert plan.memory.room.place == "host"
    assert plan.memory.gpus[0].visible_bytes == HOST
    assert "of host memory" in plan.memory.why_not


def test_the_legal_splits_are_those_that_share_heads_and_channels(released):
    assert legal_tensor_parallel(released.spec.decoder) == [1, 2, 4, 8, 16, 32, 64]
    assert {tensor for tensor, _ in legal_splits(released.spec, 8)} == {1, 2, 4, 8}
    assert (2, 3) in legal_splits(released.spec, 8)


@pytest.mark.parametrize(
    ("changes", "telling", "hint"),
    [
        ({"decoder_tensor_parallel": 3}, "tensor_parallel 3 cannot share 64 heads", "legal: 1, 2, 4, 8, 16, 32, 64"),
        ({"decoder_pipeline_parallel": 81}, "pipeline_parallel 81 cannot share 80 layers", "legal: 1 to 80"),
        (
            {"decoder_tensor_parallel": 4, "decoder_pipeline_parallel": 4},
            "are 16 GPUs, a server has 8",
            "legal: 1 x 1, 2",
        ),
        ({"sku": "a100-80gb"}, "a100-80gb .* has no FP8", "quantization"),
        ({"vision_runtime": "tensorrt_rtx"}, "'tensorrt_rtx' does not exist on h100-sxm-80gb", "tensorrt"),
        ({"vision_precision": "fp8", "sku": "a100-80gb", "decoder_quantization": "none"}, "has no FP8", "bf16"),
        ({"sku": "cpu"}, "does not exist on cpu", "onnxruntime"),
        ({"decoder_max_seq_len": 65536}, "the model has 32768 positions", "32768"),
        ({"decoder_quantization": "fp8_per_channel", "sku": "b200"}, "not from compute capability 10.0 on", "fp8"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(released, profile_with, changes, telling, hint):
    with pytest.raises(NvlmError, match=telling) as refusal:
        make_plan(released, profile_with(**changes), HOST)
    assert hint in (refusal.value.hint or "")


@st.composite
def decoders(draw: st.DrawFn) -> DecoderSpec:
    """Shapes from a toy's to twice the released model's; key/value heads divide the heads."""
    kv_heads = draw(st.sampled_from([8, 4, 3, 2, 1]))
    heads = kv_heads * draw(st.sampled_from([8, 10, 5, 1]))
    return DecoderSpec(
        vocab_size=draw(st.integers(1000, 200_000)),
        hidden_size=heads * draw(st.sampled_from([128, 192, 32])),
        intermediate_size=draw(st.sampled_from([29568, 57344, 11008, 96])),
        layers=draw(st.sampled_from([80, 96, 61, 30, 3, 1])),
        heads=heads,
        kv_heads=kv_heads,
        norm_epsilon=1e-6,
        rotary_base=1e6,
        max_positions=131_072,
    )


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Any model, with any choices, on any GPU; those that are refused are left out."""
    base = planned_model(spec_name="nvlm-d-72b").spec
    decoder = draw(decoders())
    projector = replace(base.projector, hidden_size=decoder.intermediate_size, output_size=decoder.hidden_size)
    vision = replace(base.vision, layers=draw(st.integers(1, 45)))
    model = PlannedModel("random", replace(base, vision=vision, projector=projector, decoder=decoder), "derived")
    profile = load_profile("h100-sxm-80gb-throughput")
    choice = profile.decoder.model_copy(
        update={
            "quantization": draw(st.sampled_from(["fp8", "fp8_per_channel", "none"])),
            "kv_cache": draw(st.sampled_from(["16bit", "fp8"])),
            "tensor_parallel": draw(st.sampled_from([1, 2, 4, 8])),
            "pipeline_parallel": draw(st.integers(1, 4)),
            "max_batch_size": draw(st.integers(1, 256)),
            "max_seq_len": draw(st.integers(256, 131_072)),
        }
    )
    profile = profile.model_copy(
        update={
            "sku": draw(st.sampled_from(GPUS)),
            "decoder": choice,
            "vision": profile.vision.model_copy(update={"max_tiles_per_run": draw(st.integers(1, 64))}),
            "serving": profile.serving.model_copy(update={"max_images": draw(st.integers(1, 16))}),
        }
    )
    try:
        return make_plan(model, profile, HOST)
    except NvlmError:
        assume(False)
        raise


def recomputed_bytes(plan: Plan, rank: int) -> int:
    """What lies on a GPU at the least, by this test's own arithmetic: every rank's own tensors, tables and cache."""
    spec, choice = plan.model.spec, plan.profile.decoder
    sizes = {"BF16": 2, "F8_E4M3": 1, "F32": 4}
    tensors = layout_of(spec, plan.profile).rank_tensors(rank).values()
    weights = sum(sizes[dtype] * math.prod(shape) for dtype, shape in tensors)
    visual = min(plan.profile.serving.max_images * 7, choice.max_seq_len // 256) * 256
    table = choice.max_batch_size * visual * spec.decoder.hidden_size * 2
    stage = rank // choice.tensor_parallel
    layers = sum(1 for part in range(spec.decoder.layers) if stage_of(part, plan) == stage)
    heads = max(1, spec.decoder.kv_heads // choice.tensor_parallel)
    a_token = 2 * layers * heads * spec.decoder.head_size * (1 if choice.kv_cache == "fp8" else 2)
    total = weights + 2 * table + a_token * plan.memory.kv_tokens
    if rank == 0:
        vision = spec.vision
        block = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
        total += 2 * vision.layers * block + 2 * spec.projector.hidden_size * (12800 + spec.decoder.hidden_size)
    return total


def stage_of(layer: int, plan: Plan) -> int:
    """torch.tensor_split's rule: the first stages have one layer more."""
    size, more = divmod(plan.model.spec.decoder.layers, plan.profile.decoder.pipeline_parallel)
    return layer // (size + 1) if layer < more * (size + 1) else more + (layer - more * (size + 1)) // max(1, size)


@given(plans())
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
def test_what_is_called_fitting_never_exceeds_the_memory(plan: Plan) -> None:
    visible = int(load_sku(plan.profile.sku).visible_gib * 2**30)
    for gpu in plan.memory.gpus:
        assert gpu.visible_bytes == visible
        assert plan.memory.used_bytes(gpu) == sum(line.size_bytes for line in gpu.lines) + plan.memory.kv_bytes(gpu)
        assert plan.memory.used_bytes(gpu) >= recomputed_bytes(plan, gpu.rank)
        if plan.memory.fits:
            assert plan.memory.used_bytes(gpu) <= visible
    if plan.memory.fits:
        assert plan.memory.kv_tokens >= plan.profile.decoder.max_seq_len
        assert plan.memory.requests(plan.profile.decoder.max_seq_len) >= 1
    else:
        assert any(plan.memory.needed_bytes(gpu) > visible for gpu in plan.memory.gpus)


@given(decoders(), st.integers(1, 64))
@settings(max_examples=60, deadline=None)
def test_a_split_is_legal_exactly_when_every_rank_gets_the_same(spec: DecoderSpec, ranks: int) -> None:
    whole_heads = spec.heads % ranks == 0
    shared_keys = spec.kv_heads % ranks == 0 or (ranks > spec.kv_heads and ranks % spec.kv_heads == 0)
    legal = whole_heads and shared_keys and spec.intermediate_size % ranks == 0
    assert (ranks in legal_tensor_parallel(spec)) == legal


@pytest.mark.parametrize("name", [name for name in profile_names() if not name.startswith("cpu")])
def test_the_share_of_free_memory_leaves_the_cache_its_tokens_and_the_rest_its_bytes(released, name):
    """Free is what is not taken when TensorRT-LLM makes the cache; the encoder is there already."""
    profile = load_profile(name)
    account = memory_account(released.spec, profile, room_of(load_sku(profile.sku), 0))
    for gpu in account.gpus:
        free = gpu.visible_bytes - gpu.fixed_bytes + gpu.later_bytes
        assert account.kv_share_of_free * free >= account.kv_bytes(gpu)
    assert account.kv_share_of_free < 1
