"""The same questions answered by vLLM, in an environment of its own, and by this project's reference decoder."""

from __future__ import annotations

import itertools
import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nvlm_deploy.checkpoint.reader import Checkpoint
from nvlm_deploy.model.decoder import Decoder
from nvlm_deploy.model.prompt import PromptBuilder
from nvlm_deploy.model.reference import decoder_from_hf
from nvlm_deploy.model.spec import spec_from_checkpoint
from nvlm_deploy.model.vision import vision_tower_from_checkpoint
from nvlm_deploy.sample_embeddings import SampleEmbedder
from nvlm_deploy.samples import Sample, read_samples

REPOSITORY = Path(__file__).parents[2]
MODEL = REPOSITORY / "tests/models/nvlm-d-tiny"
HELDOUT = REPOSITORY / "tests/models/heldout"
PYTHON = REPOSITORY / ".venv-vllm/bin/python"
IMAGES, TEXTS, MAX_TOKENS = 100, 20, 12
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


def vllm_answers(model: Path, samples: Sequence[Sample], scratch: Path, *options: str | Path) -> list[Answer]:
    """vLLM's answers; its prompts carry `<image>` and one newline where ours puts the picture.

    `options` are those of vllm/run.py. What vLLM says is in `scratch`/log.
    """
    if not PYTHON.is_file():
        pytest.fail("no vLLM environment: run `make oracle-vllm`")
    scratch.mkdir(parents=True, exist_ok=True)
    prompts = PromptBuilder(MODEL / "tokenizer.json", spec_from_checkpoint(Checkpoint.open(MODEL)))
    requests = [
        {
            "prompt": prompts.text("<image>\n" * len(sample.images) + sample.question),
            "images": [str(path) for path in sample.images],
            "max_tokens": MAX_TOKENS,
        }
        for sample in samples
    ]
    (scratch / "requests.json").write_text(json.dumps(requests))
    script = REPOSITORY / "tests/oracles/vllm/run.py"
    command = [PYTHON, script, model, scratch / "requests.json", scratch / "results.json", *options]
    with (scratch / "log").open("w") as log:
        code = subprocess.run(command, cwd=scratch, stdout=log, stderr=log, check=False).returncode
    if code:
        pytest.fail(f"vLLM ended with code {code}:\n{(scratch / 'log').read_text()[-3000:]}")
    results: list[dict[str, Any]] = json.loads((scratch / "results.json").read_text())["results"]
    return [Answer(r["prompt_token_ids"], r["token_ids"], r["logprobs"], r["text"]) for r in results]


def our_answers(folder: Path, samples: Sequence[Sample], dtype: torch.dtype = torch.float32) -> list[Answer]:
    """The decoder of a folder behind the small model's encoder in float32, each answer by itself, without a cache."""
    checkpoint = Checkpoint.open(MODEL)
    spec = spec_from_checkpoint(checkpoint)
    tower, decoder = vision_tower_from_checkpoint(checkpoint, spec), decoder_from_hf(folder, dtype)
    prompts = PromptBuilder(MODEL / "tokenizer.json", spec)

    def encode(tiles: np.ndarray) -> np.ndarray:
        return tower(torch.from_numpy(tiles)).numpy()

    embedder = SampleEmbedder(prompts, spec.tiling, encode, decoder.model.embed_tokens.weight)
    return [_answer(decoder, embedder, sample, spec.prompt.eos_token_id) for sample in samples]


@torch.inference_mode()
def _answer(decoder: Decoder, embedder: SampleEmbedder, sample: Sample, eos: int) -> Answer:
    embeddings, ids, logprobs = embedder.prompt(sample), [], []
    while len(ids) < MAX_TOKENS and eos not in ids:
        scores = decoder(embeddings[None])[0, -1].float().log_softmax(-1)
        ids.append(int(scores.argmax()))
        logprobs.append(float(scores[ids[-1]]))
        embeddings = torch.cat([embeddings, decoder.embed(torch.tensor(ids[-1:]))])
    return Answer(embedder.prompt_ids(sample), ids, logprobs, embedder.prompts.tokenizer.decode(ids))


def differing(ours: Sequence[Answer], theirs: Sequence[Answer]) -> list[int]:
    """Numbers of the questions whose answers differ in a token."""
    return [number for number, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0].ids != pair[1].ids]


def logprob_differences(ours: Sequence[Answer], theirs: Sequence[Answer]) -> list[float]:
    """Of every token of the answers that are equal."""
    return [
        abs(a - b)
        for mine, other in zip(ours, theirs, strict=True)
        if mine.ids == other.ids
        for a, b in zip(mine.logprobs, other.logprobs, strict=True)
    ]
