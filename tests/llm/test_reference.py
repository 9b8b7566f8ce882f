"""The reference decoder on everything that one calibration becomes: recipes, splits, and both folder layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nvlm_deploy.checkpoint.reader import Checkpoint
from nvlm_deploy.checkpoint.trtllm_layout import FP8, FP8_PER_CHANNEL, Parallelism, rank_file
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.llm.calibrate import CalibrationResult
from nvlm_deploy.llm.hf_checkpoint import hf_checkpoint_from
from nvlm_deploy.llm.trtllm import trtllm_checkpoint_from
from nvlm_deploy.model.decoder import Decoder
from nvlm_deploy.model.fp8_linear import Fp8Linear
from nvlm_deploy.model.fused import fused
from nvlm_deploy.model.reference import decoder_from_folder, decoder_from_trtllm
from nvlm_deploy.model.spec import spec_from_checkpoint
from nvlm_deploy.samples import read_samples
from nvlm_deploy.validate.in_process import greedy

pytestmark = pytest.mark.slow

TINY = Path(__file__).resolve().parents[1] / "models" / "nvlm-d-tiny"
HELD_OUT = TINY.parent / "heldout"
# (quant_algo, kv_cache_quant_algo)
RECIPES: dict[str, tuple[str | None, str | None]] = {
    "BF16": (None, None),
    "FP8": (FP8, None),
    "per channel": (FP8_PER_CHANNEL, None),
    "FP8 and cache": (FP8, FP8),
    "per channel and cache": (FP8_PER_CHANNEL, FP8),
}
SPLITS = [Parallelism(1), Parallelism(2), Parallelism(4), Parallelism(1, 2)]


def written(
    case: Any, calibration: CalibrationResult, folder: Path, recipe: str, split: Parallelism = SPLITS[0]
) -> Path:
    quant_algo, kv_cache = RECIPES[recipe]
    trtllm_checkpoint_from(
        case.checkpoint,
        case.spec,
        folder,
        calibration=calibration,
        parallelism=split,
        quant_algo=quant_algo,
        kv_cache_quant_algo=kv_cache,
    )
    return folder


@torch.no_grad()
def logits(decoder: Any, sample: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = decoder(sample[None].to(decoder.model.embed_tokens.weight.dtype))[0].double()
    return found


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0).item()


@pytest.mark.parametrize("recipe", ["BF16", "FP8", "per channel and cache"])
def test_ranks_of_any_split_merge_to_the_same_logits(
    case: Any, calibration: CalibrationResult, tmp_path: Path, recipe: str
) -> None:
    splits = [SPLITS[0], Parallelism(2, 2), Parallelism(8, 4)]
    decoders = [
        decoder_from_trtllm(written(case, calibration, tmp_path / str(number), recipe, split))
        for number, split in enumerate(splits)
    ]
    expected = logits(decoders[0], case.samples[1])
    assert all(torch.equal(logits(decoder, case.samples[1]), expected) for decoder in decoders[1:])


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "BF16"])
def test_each_recipe_stays_near_transformers_and_is_not_it(
    case: Any, calibration: CalibrationResult, tmp_path: Path, recipe: str
) -> None:
    decoder, peer = decoder_from_trtllm(written(case, calibration, tmp_path / "d", recipe)), case.peer()
    for sample in case.samples[:3]:
        with torch.no_grad():
            theirs = peer(inputs_embeds=sample[None]).logits[0].double()
        assert (0.99 if case.trained else 0.95) < cosine(logits(decoder, sample), theirs) < 0.9999999


@pytest.mark.parametrize("recipe", ["FP8", "per channel"])
def test_fp8_weights_stay_the_checkpoints_own_bytes(
    random_case: Any, tmp_path: Path, recipe: str, request: pytest.FixtureRequest
) -> None:
    from nvlm_deploy.llm.calibrate import calibrate

    calibration = calibrate(random_case.checkpoint, random_case.spec, random_case.samples)
    folder = written(random_case, calibration, tmp_path / "d", recipe)
    stored, decoder = load_file(folder / rank_file(0)), decoder_from_trtllm(folder)
    linears = {name: part for name, part in decoder.named_modules() if isinstance(part, Fp8Linear)}
    assert len(linears) == 7 * random_case.spec.decoder.layers
    assert all(linear.weight.dtype == torch.float8_e4m3fn for linear in linears.values())
    codes = linears["model.layers.2.mlp.gate_proj"].weight
    assert torch.equal(codes.view(torch.uint8), stored["transformer.layers.2.mlp.fc.weight"].view(torch.uint8))
    assert not any(isinstance(part, Fp8Linear) for part in (decoder.lm_head, decoder.model.embed_tokens))


def test_in_bfloat16_it_is_as_near_to_float32_as_transformers_in_bfloat16(
    case: Any, calibration: CalibrationResult, tmp_path: Path
) -> None:
    folder = written(case, calibration, tmp_path / "d", "BF16")
    ours, theirs, exact = decoder_from_trtllm(folder, torch.bfloat16), case.peer(torch.bfloat16), case.peer()
    found, distances = [], []
    for sample in case.samples:
        sample = sample.bfloat16()
        with torch.no_grad():
            peers, wanted = (
                peer(inputs_embeds=sample[None].to(peer.dtype)).logits[0].double() for peer in (theirs, exact)
            )
        mine = logits(ours, sample)
        found.append(cosine(mine, peers))
        distances.append([((side - wanted).norm() / wanted.norm()).item() for side in (mine, peers)])
    print("cosines with transformers in bfloat16:", min(found), "; distances from float32:", distances[0])
    assert min(found) > 0.9999
    assert all(mine < 1.5 * peers for mine, peers in distances)


@pytest.mark.parametrize("case", ["tiny"], indirect=True)
@pytest.mark.parametrize("recipe", ["BF16", "FP8", "per channel", "FP8 and cache"])
def test_a_hugging_face_folder_gives_the_logits_of_the_trtllm_checkpoint(
    case: Any, calibration: CalibrationResult, tmp_path: Path, recipe: str
) -> None:
    quant_algo, kv_cache = RECIPES[recipe]
    spec = spec_from_checkpoint(case.checkpoint)
    hf_checkpoint_from(
        case.checkpoint,
        spec,
        tmp_path / "hf",
        calibration=calibration,
        quant_algo=quant_algo,
        kv_cache_quant_algo=kv_cache,
    )
    ours = decoder_from_folder(tmp_path / "hf")
    wanted = decoder_from_folder(written(case, calibration, tmp_path / "trtllm", recipe))
    assert ours.has_fp8_kv_cache == wanted.has_fp8_kv_cache == (kv_cache is not None)
    _share_cache_scales(ours, wanted)
    for sample in case.samples[:2]:
        assert torch.equal(logits(ours, sample), logits(wanted, sample))


def _share_cache_scales(ours: Decoder, wanted: Decoder) -> None:
    """In a TensorRT-LLM checkpoint a layer has one, never below 1 (contract A.7); the folder has amax / 448 of each."""
    for one, other in zip(ours.model.layers, wanted.model.layers, strict=True):
        if one.self_attn.key_scale is None:
            continue
        assert {one.self_attn.key_scale.dtype, one.self_attn.value_scale.dtype} == {torch.float32}
        assert one.self_attn.key_scale.item() != one.self_attn.value_scale.item()
        assert other.self_attn.key_scale.item() == other.self_attn.value_scale.item() >= 1
        other.self_attn.key_scale, other.self_attn.value_scale = one.self_attn.key_scale, one.self_attn.value_scale


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NvlmError):
        decoder_from_folder(tmp_path)


def test_nan_codes_are_named(random_case: Any, tmp_path: Path) -> None:
    from nvlm_deploy.llm.calibrate import calibrate

    calibration = calibrate(random_case.checkpoint, random_case.spec, random_case.samples)
    folder = written(random_case, calibration, tmp_path / "d", "FP8")
    tensors = load_file(folder / rank_file(0))
    tensors["transformer.layers.1.mlp.proj.weight"].view(torch.uint8)[3, 4] = 0xFF
    save_file(tensors, folder / rank_file(0))
    with pytest.raises(NvlmError, match=r"model\.layers\.1\.mlp\.down_proj\.weight holds NaN"):
        decoder_from_trtllm(folder)


def test_greedy_texts_over_200_prompts_are_the_same_for_every_split_of_one_calibration(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """The trained model on held-out questions, most of them about pictures, by FP8 checkpoints."""
    from nvlm_deploy.llm.calibrate import calibrate
    from nvlm_deploy.model.prompt import PromptBuilder
    from nvlm_deploy.model.vision import vision_tower_from_checkpoint
    from nvlm_deploy.sample_embeddings import SampleEmbedder

    checkpoint = Checkpoint.open(tiny_folder)
    spec = spec_from_checkpoint(checkpoint)
    tower = vision_tower_from_checkpoint(checkpoint, spec)
    prompts = PromptBuilder(tiny_folder / "tokenizer.json", spec)
    table = checkpoint.tensor("language_model.model.embed_tokens.weight").float()
    embedder = SampleEmbedder(prompts, spec.tiling, lambda tiles: tower(torch.tensor(tiles)).numpy(), table)
    samples = read_samples(HELD_OUT, limit=200)
    embedded = [embedder.prompt(sample) for sample in samples]
    calibration = calibrate(
        checkpoint, spec, [embedder.prompt_and_answer(s) for s in read_samples(TINY.parent / "calibration", limit=16)]
    )
    answers = []
    for number, split in enumerate(SPLITS):
        folder = tmp_path / str(number)
        trtllm_checkpoint_from(checkpoint, spec, folder, calibration=calibration, parallelism=split)
        decoder = decoder_from_trtllm(folder)
        with torch.inference_mode():
            answers.append(
                [
                    prompts.tokenizer.decode(ids)
                    for start in range(0, len(embedded), 25)
                    for ids in greedy(
                        decoder, embedded[start : start + 25], end_ids=[spec.prompt.eos_token_id], max_tokens=14
                    )
                ]
            )
    assert len(answers[0]) == 200
    assert len(set(answers[0])) > 50, "answers that differ among themselves show more"
    assert sum(text == sample.answer for text, sample in zip(answers[0], samples, strict=True)) > 180
    assert answers[1:] == [answers[0]] * 3


@pytest.mark.parametrize("recipe", RECIPES)
def test_joint_linears_change_nothing_but_the_order_of_sums(
    case: Any, calibration: CalibrationResult, tmp_path: Path, recipe: str
) -> None:
    folder = written(case, calibration, tmp_path / "d", recipe, Parallelism(2))
    decoder, joint = decoder_from_trtllm(folder), fused(decoder_from_trtllm(folder))
    assert not any(name.endswith((".q_proj", ".up_proj")) for name, _ in joint.named_modules())
    assert sum(buffer.nbytes for buffer in joint.buffers()) <= sum(buffer.nbytes for buffer in decoder.buffers())
    for sample in case.samples[:2]:
        assert cosine(logits(joint, sample), logits(decoder, sample)) > (0.999999 if recipe == "BF16" else 0.999)


def test_fp8_linears_with_scales_of_their_own_stay_apart(random_case: Any, tmp_path: Path) -> None:
    """ModelOpt's folders have such (contract D.2)."""
    from nvlm_deploy.llm.calibrate import calibrate

    calibration = calibrate(random_case.checkpoint, random_case.spec, random_case.samples)
    folder = written(random_case, calibration, tmp_path / "d", "FP8")
    decoder, joint = decoder_from_trtllm(folder), decoder_from_trtllm(folder)
    for either in (decoder, joint):
        either.model.layers[1].self_attn.k_proj.weight_scale = torch.tensor(0.5)
    fused(joint)
    attention = joint.model.layers[1].self_attn
    assert attention.qkv_proj is None
    assert joint.model.layers[0].self_attn.qkv_proj is not None
    assert cosine(*(logits(either, random_case.samples[0]) for either in (decoder, joint))) > 0.999
