"""The whole small model against vLLM's own NVLM-D on the CPU: prompt ids, log-probabilities, text.

Needs the environment of `make oracle-vllm`; it is not part of `make test`.
"""

from __future__ import annotations

import itertools
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nvlm_deploy.checkpoint.reader import Checkpoint
from nvlm_deploy.model.decoder import Decoder, decoder_from_checkpoint
from nvlm_deploy.model.prompt import PromptBuilder, wrapped
from nvlm_deploy.model.spec import spec_from_checkpoint
from nvlm_deploy.model.vision import vision_tower_from_checkpoint
from nvlm_deploy.sample_embeddings import SampleEmbedder
from nvlm_deploy.samples import Sample, read_samples

REPOSITORY = Path(__file__).parents[2]
MODEL = REPOSITORY / "tests/models/nvlm-d-tiny"
HELDOUT = REPOSITORY / "tests/models/heldout"
PYTHON = REPOSITORY / ".venv-vllm/bin/python"
IMAGES, TEXTS, MAX_TOKENS = 100, 20, 12
LOGPROB_TOLERANCE = 1e-2
# ratios from 6:1 to 1:6, smaller and larger than their tiles, exact and odd
SIZES = [
    (56 * w + dx, 56 * h + dy) for w, h in itertools.product(range(1, 7), repeat=2) for dx, dy in ((0, 0), (13, -9))
]


@dataclass(frozen=True)
class Answer:
    """One greedy answer with the log-probability of each token."""

    prompt_ids: list[int]
    ids: list[int]
    logprobs: list[float]
    text: str


def image_samples(folder: Path) -> list[Sample]:
    """Held-out pictures rescaled to many sizes, each with its own question."""
    originals = [sample for sample in read_samples(HELDOUT) if sample.images]
    samples = []
    for number in range(IMAGES):
        sample = originals[7 * number % len(originals)]
        path = folder / f"{number}.png"
        Image.open(sample.images[0]).convert("RGB").resize(SIZES[number % len(SIZES)]).save(path)
        samples.append(sample.model_copy(update={"images": (path,)}))
    return samples


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    texts = [sample for sample in read_samples(HELDOUT) if not sample.images][:TEXTS]
    return [*image_samples(tmp_path_factory.mktemp("images")), *texts]


@pytest.fixture(scope="module")
def theirs(samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> list[Answer]:
    """vLLM's answers; its prompts carry `<image>` and one newline where ours puts the picture."""
    if not PYTHON.is_file():
        pytest.fail("no vLLM environment: run `make oracle-vllm`")
    folder = tmp_path_factory.mktemp("vllm")
    requests = [
        {
            "prompt": wrapped("<image>\n" * len(sample.images) + sample.question, "chat", "Answer the questions."),
            "images": [str(path) for path in sample.images],
            "max_tokens": MAX_TOKENS,
        }
        for sample in samples
    ]
    (folder / "requests.json").write_text(json.dumps(requests))
    script = REPOSITORY / "tests/oracles/vllm/run.py"
    command = [PYTHON, script, MODEL, folder / "requests.json", folder / "results.json"]
    subprocess.run(command, check=True, cwd=folder)
    results: list[dict[str, Any]] = json.loads((folder / "results.json").read_text())["results"]
    return [Answer(r["prompt_token_ids"], r["token_ids"], r["logprobs"], r["text"]) for r in results]


@pytest.fixture(scope="module")
def ours(samples: list[Sample]) -> list[Answer]:
    """The unquantised model in float32 torch, each answer by itself, without a cache."""
    checkpoint = Checkpoint.open(MODEL)
    spec = spec_from_checkpoint(checkpoint)
    tower, decoder = vision_tower_from_checkpoint(checkpoint, spec), decoder_from_checkpoint(checkpoint, spec)
    prompts = PromptBuilder(MODEL / "tokenizer.json", spec)

    def encode(tiles: np.ndarray) -> np.ndarray:
        return tower(torch.from_numpy(tiles)).numpy()

    embedder = SampleEmbedder(prompts, spec.tiling, encode, decoder.model.embed_tokens.weight)
    return [answer(decoder, embedder, sample, spec.prompt.eos_token_id) for sample in samples]


@torch.inference_mode()
def answer(decoder: Decoder, embedder: SampleEmbedder, sample: Sample, eos: int) -> Answer:
    embeddings, ids, logprobs = embedder.prompt(sample), [], []
    while len(ids) < MAX_TOKENS and eos not in ids:
        scores = decoder(embeddings[None])[0, -1].log_softmax(-1)
        ids.append(int(scores.argmax()))
        logprobs.append(float(scores[ids[-1]]))
        embeddings = torch.cat([embeddings, decoder.embed(torch.tensor(ids[-1:]))])
    return Answer(embedder.prompt_ids(sample), ids, logprobs, embedder.prompts.tokenizer.decode(ids))


def test_prompt_ids_are_equal_for_every_image_size_and_for_text(ours: list[Answer], theirs: list[Answer]) -> None:
    assert len(ours) == len(theirs) == IMAGES + TEXTS
    assert [mine.prompt_ids for mine in ours] == [other.prompt_ids for other in theirs]


def test_greedy_text_is_equal_for_99_of_100(ours: list[Answer], theirs: list[Answer]) -> None:
    different = [number for number, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0].ids != pair[1].ids]
    assert len(different) <= len(ours) // 100, f"different answers at {different}"
    assert all(a.text.strip() == b.text.strip() for a, b in zip(ours, theirs, strict=True) if a.ids == b.ids)


def test_log_probabilities_agree_within_a_hundredth(ours: list[Answer], theirs: list[Answer]) -> None:
    pairs = [pair for pair in zip(ours, theirs, strict=True) if pair[0].ids == pair[1].ids]
    worst = max(abs(a - b) for mine, other in pairs for a, b in zip(mine.logprobs, other.logprobs, strict=True))
    print(f"\n{len(pairs)} of {len(ours)} answers equal, largest log-probability difference {worst:.2e}")
    assert worst < LOGPROB_TOLERANCE
