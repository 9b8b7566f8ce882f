"""The unified Hugging Face folders in vLLM on the CPU: it accepts every tensor, and answers as our reference decoder.

vLLM multiplies e4m3 operands with `torch._scaled_mm`, its activations in BF16: it takes no float32 beside FP8 weights.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle_answers import MODEL, Answer, differing, logprob_differences, our_answers, vllm_answers
from safetensors.torch import load_file

from nvlm_deploy.checkpoint.reader import Checkpoint
from nvlm_deploy.checkpoint.trtllm_layout import FP8, FP8_PER_CHANNEL
from nvlm_deploy.llm.calibrate import CalibrationResult, calibrate
from nvlm_deploy.llm.hf_checkpoint import hf_checkpoint_from
from nvlm_deploy.model.prompt import PromptBuilder
from nvlm_deploy.model.spec import spec_from_checkpoint
from nvlm_deploy.model.vision import vision_tower_from_checkpoint
from nvlm_deploy.sample_embeddings import SampleEmbedder
from nvlm_deploy.samples import Sample, read_samples

# quant_algo, kv_cache_quant_algo, and what vLLM computes in
KINDS: dict[str, tuple[str | None, str | None, str]] = {
    "bf16": (None, None, "float32"),
    "fp8": (FP8, None, "bfloat16"),
    "fp8 per channel": (FP8_PER_CHANNEL, None, "bfloat16"),
    "fp8 data-free": (FP8_PER_CHANNEL, FP8, "bfloat16"),
    "fp8 with fp8 cache": (FP8, FP8, "bfloat16"),
}
LAYERS = 4


@dataclass(frozen=True)
class Run:
    """One folder, answered by both sides, and the network's tensors as vLLM holds them after loading."""

    kind: str
    folder: Path
    ours: list[Answer]
    theirs: list[Answer]
    held: dict[str, torch.Tensor]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return Checkpoint.open(self.folder).tensors("")


@pytest.fixture(scope="module")
def calibration() -> CalibrationResult:
    """Of prompts and answers with their pictures."""
    checkpoint = Checkpoint.open(MODEL)
    spec = spec_from_checkpoint(checkpoint)
    tower = vision_tower_from_checkpoint(checkpoint, spec)

    def encode(tiles: np.ndarray) -> np.ndarray:
        return tower(torch.from_numpy(tiles)).numpy()

    table = checkpoint.tensor("language_model.model.embed_tokens.weight").float()
    embedder = SampleEmbedder(PromptBuilder(MODEL / "tokenizer.json", spec), spec.tiling, encode, table)
    samples = read_samples(MODEL.parent / "calibration")
    return calibrate(checkpoint, spec, [embedder.prompt_and_answer(sample) for sample in samples[::5]])


@pytest.fixture(scope="module", params=list(KINDS))
def run(
    request: pytest.FixtureRequest,
    calibration: CalibrationResult,
    samples: list[Sample],
    tmp_path_factory: pytest.TempPathFactory,
) -> Run:
    kind: str = request.param
    quant_algo, kv_cache_quant_algo, dtype = KINDS[kind]
    scratch = tmp_path_factory.mktemp("vllm")
    checkpoint = Checkpoint.open(MODEL)
    folder = hf_checkpoint_from(
        checkpoint,
        spec_from_checkpoint(checkpoint),
        scratch / "folder",
        calibration=None if kind in ("bf16", "fp8 data-free") else calibration,
        quant_algo=quant_algo,
        kv_cache_quant_algo=kv_cache_quant_algo,
        max_shard_bytes=2_000_000,
    ).folder
    weights = scratch / "weights.safetensors"
    theirs = vllm_answers(folder, samples, scratch / "vllm", "--dtype", dtype, "--weights", weights)
    return Run(kind, folder, our_answers(folder, samples), theirs, load_file(weights))


def test_the_answers_are_those_of_our_reference_decoder(run: Run, samples: list[Sample]) -> None:
    """In float32 both sides agree to a hundredth.

    In BF16, as vLLM computes beside FP8 weights, an activation at a tie between two codes falls either way. Our own
    decoder, in BF16 against itself in float32, then gives 0 to 2 other answers of 120; log-probabilities move by 0.005
    to 0.008 in the mean and 0.12 to 0.43 at most, that with the data-free FP8 cache.
    """
    different, off = differing(run.ours, run.theirs), logprob_differences(run.ours, run.theirs)
    print(
        f"\n{run.kind}: {len(samples) - len(different)} of {len(samples)} answers equal, "
        f"log-probabilities off by {max(off):.2e} at most, {statistics.mean(off):.2e} in the mean"
    )
    assert [mine.prompt_ids for mine in run.ours] == [other.prompt_ids for other in run.theirs]
    allowed, most, mean = (1, 1e-2, 1e-3) if run.kind == "bf16" else (4, 0.5, 0.02)
    assert len(different) <= allowed, different
    assert max(off) < most
    assert statistics.mean(off) < mean


def test_vllm_holds_the_codes_and_scales_of_the_folder_after_fusing_and_requantising(run: Run) -> None:
    """Shared scales: what it does to fused linears changes no code."""
    if run.kind == "bf16":
        pytest.skip("no codes in a BF16 folder")
    tensors, compared = run.tensors, 0
    for held, parts in fused_linears():
        codes = torch.cat([tensors[f"{part}.weight"] for part in parts])
        theirs = run.held[f"{held}.weight"]
        assert torch.equal(theirs.t().contiguous().view(torch.uint8), codes.view(torch.uint8)), held
        scales = [tensors[f"{part}.weight_scale"] for part in parts]
        if scales[0].ndim:
            assert torch.equal(run.held[f"{held}.weight_scale"].flatten(), torch.cat(scales)), held
        else:
            assert {run.held[f"{held}.weight_scale"].item()} == {scale.item() for scale in scales}, held
            inputs = {tensors[f"{part}.input_scale"].item() for part in parts}
            assert {run.held[f"{held}.input_scale"].item()} == inputs, held
        compared += len(parts)
    assert compared == 7 * LAYERS


def test_vllm_holds_the_scales_of_the_fp8_cache_and_no_others(run: Run) -> None:
    """It reads them into BF16 before it widens them again."""
    has_cache = KINDS[run.kind][1] is not None
    for layer in range(LAYERS):
        attention = f"language_model.model.layers.{layer}.self_attn"
        for which in "kv":
            ours = run.tensors[f"{attention}.{which}_proj.{which}_scale"] if has_cache else torch.tensor(1.0)
            assert run.held[f"{attention}.attn._{which}_scale"].item() == ours.bfloat16().item()


def test_every_other_tensor_is_in_vllm_bit_for_bit(run: Run) -> None:
    """Those that its CPU kernels pack have no elements left to compare; its answers speak for them."""
    fused = {part for _, parts in fused_linears() for part in parts}
    compared = packed = 0
    for name, tensor in run.tensors.items():
        if name.rpartition(".")[0] in fused:
            continue
        theirs = run.held[name]
        packed += theirs.numel() == 0
        if theirs.numel():
            assert torch.equal(theirs, tensor.to(theirs.dtype)), name
            compared += 1
    print(f"\n{run.kind}: {compared} tensors equal, {packed} packed")
    assert compared > 50


def fused_linears() -> Iterator[tuple[str, list[str]]]:
    """vLLM's linear and those it is made of."""
    for number in range(LAYERS):
        layer = f"language_model.model.layers.{number}"
        yield f"{layer}.self_attn.qkv_proj", [f"{layer}.self_attn.{which}_proj" for which in "qkv"]
        yield f"{layer}.self_attn.o_proj", [f"{layer}.self_attn.o_proj"]
        yield f"{layer}.mlp.gate_up_proj", [f"{layer}.mlp.{which}_proj" for which in ("gate", "up")]
        yield f"{layer}.mlp.down_proj", [f"{layer}.mlp.down_proj"]
