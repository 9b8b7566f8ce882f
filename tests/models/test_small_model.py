"""The trained small model has the released layout with its quirks, and answers questions about scans it never saw."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from nvlm_deploy.checkpoint.reader import Checkpoint
from nvlm_deploy.model.inventory import require_tensors
from nvlm_deploy.model.spec import spec_from_checkpoint
from nvlm_deploy.profile import load_profile
from nvlm_deploy.recipe import Recipe
from nvlm_deploy.samples import read_samples
from nvlm_deploy.vision.heads import nonzero_dummy_tensors

HELD_OUT = Path(__file__).parent / "heldout"


@pytest.fixture(scope="module")
def checkpoint(tiny_folder: Path) -> Checkpoint:
    return Checkpoint.open(tiny_folder)


def test_it_has_every_tensor_of_the_layout_in_three_shards_of_at_most_8_mb(checkpoint: Checkpoint) -> None:
    assert require_tensors(checkpoint, spec_from_checkpoint(checkpoint)) == []
    assert len(checkpoint.shards) >= 3
    assert sum(shard.stat().st_size for shard in checkpoint.shards) <= 8_000_000
    assert {info.dtype for info in checkpoint.infos.values()} == {"BF16"}


def test_its_config_has_the_releases_quirks(checkpoint: Checkpoint) -> None:
    assert checkpoint.config["architectures"] == ["NVLM_D"]
    assert checkpoint.config["llm_config"]["model_type"] == "llama"
    assert checkpoint.config["llm_config"]["architectures"] == ["Qwen2ForCausalLM"]
    spec = spec_from_checkpoint(checkpoint)
    assert (
        checkpoint.config["vision_config"]["num_attention_heads"] == spec.vision.heads == spec.vision.padded_heads - 7
    )


def test_its_seven_dummy_heads_are_zero(checkpoint: Checkpoint) -> None:
    assert nonzero_dummy_tensors(checkpoint, spec_from_checkpoint(checkpoint).vision) == []


def test_its_tokenizer_has_the_control_tokens_and_plain_text_tags(checkpoint: Checkpoint) -> None:
    tokenizer = Tokenizer.from_file(str(checkpoint.folder / "tokenizer.json"))
    for token in ("<|vision_pad|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"):
        assert tokenizer.encode(token).tokens == [token]
    assert tokenizer.encode("<tile_1>").tokens == ["<", "tile", "_", "1", ">"]
    assert "><" in tokenizer.encode("<Image><tile_1>").tokens
    assert tokenizer.get_vocab_size() < checkpoint.config["llm_config"]["vocab_size"]


def test_its_vllm_files_are_there(checkpoint: Checkpoint) -> None:
    names = {path.name for path in checkpoint.folder.iterdir()}
    assert {"configuration_nvlm_d.py", "tokenizer_config.json", "generation_config.json"} <= names
    generation = json.loads((checkpoint.folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == spec_from_checkpoint(checkpoint).prompt.eos_token_id


def test_it_answers_questions_about_scans_it_never_saw(tiny_folder: Path) -> None:
    """A sample of what `evaluate.py` measures in full; 100 questions tell a broken model from a working one."""
    from nvlm_deploy.validate.in_process import reference_model

    torch.manual_seed(0)
    samples = read_samples(HELD_OUT)[::8]
    model = reference_model(Recipe(tiny_folder, load_profile("cpu-bf16"), Path()))
    texts = list(model.texts(samples, max_tokens=16))
    right = sum(text.strip() == sample.answer for text, sample in zip(texts, samples, strict=True))
    assert right / len(samples) > 0.9
