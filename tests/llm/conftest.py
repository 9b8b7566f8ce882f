"""Two decoders for every test of this folder: a random one with awkward sizes, and the trained small model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from nvlm_deploy.checkpoint.reader import Checkpoint
from nvlm_deploy.checkpoint.writer import write_shards
from nvlm_deploy.llm.calibrate import CalibrationResult, calibrate
from nvlm_deploy.model.decoder import PREFIX
from nvlm_deploy.model.spec import ModelSpec, spec_from_config

TINY = Path(__file__).resolve().parents[1] / "models" / "nvlm-d-tiny"
# an odd vocabulary, fewer key/value heads than 4 ranks, more layers than stages
RANDOM_CONFIG: dict[str, Any] = {
    "architectures": ["NVLM_D"],
    "llm_config": {
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": 203,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 128,
        "eos_token_id": 1,
        "bos_token_id": 1,
    },
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
    },
}


@dataclass(frozen=True)
class Case:
    """A checkpoint and prompts for it, as embeddings [tokens, hidden]; some rows are of no token, as an image's are."""

    checkpoint: Checkpoint
    spec: ModelSpec
    samples: list[torch.Tensor]
    trained: bool = False

    def weights(self) -> dict[str, torch.Tensor]:
        return self.checkpoint.tensors(PREFIX)

    def peer(self, dtype: torch.dtype = torch.float32) -> Any:
        """transformers' Qwen2 with the same weights."""
        from transformers import Qwen2Config, Qwen2ForCausalLM

        decoder = self.spec.decoder
        config = Qwen2Config(
            vocab_size=decoder.vocab_size,
            hidden_size=decoder.hidden_size,
            intermediate_size=decoder.intermediate_size,
            num_hidden_layers=decoder.layers,
            num_attention_heads=decoder.heads,
            num_key_value_heads=decoder.kv_heads,
            rms_norm_eps=decoder.norm_epsilon,
            rope_theta=decoder.rotary_base,
            max_position_embeddings=decoder.max_positions,
            tie_word_embeddings=False,
            architectures=["Qwen2ForCausalLM"],
        )
        model = Qwen2ForCausalLM(config)
        model.load_state_dict(self.weights())
        return model.to(dtype).eval()


@dataclass(frozen=True)
class SpoiltCheckpoint(Checkpoint):
    """A checkpoint one of whose tensors, by its full name, is filled with one value."""

    spoilt: str = ""
    value: float = 0.0

    @classmethod
    def of(cls, checkpoint: Checkpoint, spoilt: str, value: float) -> SpoiltCheckpoint:
        return cls(checkpoint.folder, checkpoint.config, checkpoint.infos, spoilt, value)

    def chunks(self, name: str, *, rows: Any = None) -> Iterator[torch.Tensor]:
        for chunk in super().chunks(name, rows=rows):
            yield torch.full_like(chunk, self.value) if name == self.spoilt else chunk


def write_decoder(folder: Path, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> Checkpoint:
    """A checkpoint folder with only a decoder in it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_shards(folder, ((PREFIX + name, weight) for name, weight in weights.items()), max_shard_bytes=100_000)
    return Checkpoint.open(folder)


def random_weights(spec: ModelSpec) -> dict[str, torch.Tensor]:
    from nvlm_deploy.model.decoder import Decoder

    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Decoder(spec.decoder).state_dict().items()}
    weights = {}
    for name, shape in shapes.items():
        spread = 0.3 if len(shape) == 1 else shape[-1] ** -0.5
        centre = 1.0 if "norm" in name else 0.0
        weights[name] = (centre + spread * torch.randn(shape, generator=generator)).bfloat16()
    return weights


@pytest.fixture(scope="session")
def random_case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return _random_case(tmp_path_factory.mktemp("decoder"), RANDOM_CONFIG)


@pytest.fixture(scope="session")
def four_key_heads_case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """As `random_case`, but four ranks need no copies of a key head."""
    llm_config = {**RANDOM_CONFIG["llm_config"], "num_key_value_heads": 4}
    return _random_case(tmp_path_factory.mktemp("decoder"), {**RANDOM_CONFIG, "llm_config": llm_config})


def _random_case(folder: Path, config: dict[str, Any]) -> Case:
    spec = spec_from_config(config)
    checkpoint = write_decoder(folder / "random", config, random_weights(spec))
    return Case(checkpoint, spec, _samples(checkpoint, spec))


@pytest.fixture(scope="session")
def spoilt() -> Callable[[Checkpoint, str, float], Checkpoint]:
    """(checkpoint, tensor, value) -> the checkpoint with that tensor filled with that value."""
    return SpoiltCheckpoint.of


@pytest.fixture(scope="session", params=["random", "tiny"])
def case(request: pytest.FixtureRequest) -> Case:
    if request.param == "random":
        random: Case = request.getfixturevalue("random_case")
        return random
    if not (TINY / "model.safetensors.index.json").is_file():
        pytest.skip("the small model is not trained yet: tests/models/train.py")
    checkpoint = Checkpoint.open(TINY)
    spec = spec_from_config(checkpoint.config)
    return Case(checkpoint, spec, _real_samples(checkpoint, spec), trained=True)


@pytest.fixture(scope="session")
def calibration(case: Case) -> CalibrationResult:
    return calibrate(case.checkpoint, case.spec, case.samples)


def _real_samples(checkpoint: Checkpoint, spec: ModelSpec) -> list[torch.Tensor]:
    """Prompts and answers with their pictures, as calibration sees them: what the trained model is for."""
    from nvlm_deploy.model.prompt import PromptBuilder
    from nvlm_deploy.model.vision import vision_tower_from_checkpoint
    from nvlm_deploy.sample_embeddings import SampleEmbedder
    from nvlm_deploy.samples import read_samples

    tower = vision_tower_from_checkpoint(checkpoint, spec)
    embedder = SampleEmbedder(
        PromptBuilder(checkpoint.folder / "tokenizer.json", spec),
        spec.tiling,
        lambda tiles: tower(torch.tensor(tiles)).numpy(),
        checkpoint.tensor("language_model.model.embed_tokens.weight").float(),
    )
    samples = read_samples(Path(__file__).parents[1] / "models" / "calibration")
    return [embedder.prompt_and_answer(sample) for sample in samples[::20]]


def _samples(checkpoint: Checkpoint, spec: ModelSpec) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    table = checkpoint.tensor(f"{PREFIX}model.embed_tokens.weight").float()
    samples = []
    for tokens in (9, 24, 17):
        sample = table[torch.randint(len(table), (tokens,), generator=generator)]
        sample[2:6] = table.std() * torch.randn(4, spec.decoder.hidden_size, generator=generator)
        samples.append(sample)
    return samples
