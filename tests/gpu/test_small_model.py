"""The small model on a GPU gives what it gives on the CPU: encoder, calibration, FP8 decoder, recorded decoding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nvlm_deploy.checkpoint.reader import Checkpoint
from nvlm_deploy.checkpoint.trtllm_layout import FP8, FP8_PER_CHANNEL
from nvlm_deploy.llm.calibrate import calibrate
from nvlm_deploy.llm.trtllm import trtllm_checkpoint_from
from nvlm_deploy.model.decoder import PREFIX
from nvlm_deploy.model.fused import fused
from nvlm_deploy.model.reference import decoder_from_trtllm
from nvlm_deploy.model.spec import ModelSpec, spec_from_checkpoint
from nvlm_deploy.model.vision import vision_tower_from_checkpoint
from nvlm_deploy.serving.kv_cache import SlottedKvCache
from nvlm_deploy.serving.reference import ReferenceEngine

STEPS, SLOTS, PROMPT_TOKENS = 12, 4, 24


@pytest.fixture(scope="module")
def checkpoint(tiny_folder: Path) -> Checkpoint:
    return Checkpoint.open(tiny_folder)


@pytest.fixture(scope="module")
def spec(checkpoint: Checkpoint) -> ModelSpec:
    return spec_from_checkpoint(checkpoint)


def prompts(spec: ModelSpec) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(3, spec.decoder.vocab_size, (SLOTS, PROMPT_TOKENS), generator=generator).tolist()


def samples(checkpoint: Checkpoint, spec: ModelSpec) -> list[torch.Tensor]:
    table = checkpoint.tensor(f"{PREFIX}model.embed_tokens.weight").float()
    return [table[torch.tensor(prompt)] for prompt in prompts(spec)]


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(one.double().flatten(), other.double().flatten(), dim=0))


def test_the_encoder_in_bf16_gives_the_embeddings_of_float32(
    device: str, checkpoint: Checkpoint, spec: ModelSpec
) -> None:
    size = spec.tiling.tile_size
    tiles = torch.randint(0, 256, (7, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = vision_tower_from_checkpoint(checkpoint, spec)(tiles)
        tower = vision_tower_from_checkpoint(checkpoint, spec, torch.bfloat16).to(device)
        found = tower(tiles.to(device)).float().cpu()
    assert min(cosine(one, other) for one, other in zip(found, wanted, strict=True)) > 0.999


def test_calibration_on_the_gpu_finds_the_amax_of_the_cpu(
    device: str, checkpoint: Checkpoint, spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = samples(checkpoint, spec)
    here = calibrate(checkpoint, spec, given).amax
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cpu = calibrate(checkpoint, spec, given).amax
    assert here.keys() == cpu.keys()
    assert max(abs(here[name] / cpu[name] - 1) for name in cpu) < 0.02


@pytest.mark.parametrize("recipe", [None, FP8, FP8_PER_CHANNEL], ids=["BF16", "FP8", "per channel"])
def test_the_decoder_gives_the_logits_of_the_cpu_step_by_step(
    device: str, checkpoint: Checkpoint, spec: ModelSpec, tmp_path: Path, recipe: str | None
) -> None:
    """Recorded decoding steps included: `warm_up` records them on a GPU. Both sides are fed the CPU's tokens."""
    calibration = calibrate(checkpoint, spec, samples(checkpoint, spec)) if recipe else None
    folder = trtllm_checkpoint_from(checkpoint, spec, tmp_path / "d", calibration=calibration, quant_algo=recipe)
    cpu, gpu = (engine_on(where, folder) for where in ("cpu", device))
    slots = list(range(SLOTS))
    found, wanted = [], []
    for slot, prompt in enumerate(prompts(spec)):
        wanted.append(cpu.prefill(slot, prompt, None))
        found.append(gpu.prefill(slot, prompt, None).cpu())
    for _ in range(STEPS):
        tokens = [int(row.argmax()) for row in wanted[-SLOTS:]]
        wanted += list(cpu.decode(slots, tokens))
        found += list(gpu.decode(slots, tokens).cpu())
    assert min(cosine(one, other) for one, other in zip(found, wanted, strict=True)) > 0.999


def engine_on(where: str, folder: Path) -> ReferenceEngine:
    decoder = fused(decoder_from_trtllm(folder, torch.bfloat16).to(where))
    kind = {"slots": SLOTS, "max_seq_len": PROMPT_TOKENS + STEPS + 1}
    engine = ReferenceEngine(decoder, SlottedKvCache(decoder.spec, **kind, dtype=torch.bfloat16, device=where))
    engine.warm_up()
    return engine
