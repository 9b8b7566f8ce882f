"""Answers without a server: tiles, encoder and batched greedy decoding in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from nvlm_deploy.model.decoder import Decoder, LayerCache, decoder_from_checkpoint
from nvlm_deploy.model.prompt import PromptBuilder
from nvlm_deploy.model.reference import decoder_from_trtllm
from nvlm_deploy.model.vision import vision_tower_from_checkpoint
from nvlm_deploy.recipe import Recipe
from nvlm_deploy.sample_embeddings import SampleEmbedder
from nvlm_deploy.samples import Sample
from nvlm_deploy.vision.engine import OnnxRuntimeEngine

VISION_FILE = "vision.onnx"
Tiles = NDArray[np.uint8]
Embeddings = NDArray[np.float32]


@dataclass(frozen=True)
class InProcessModel:
    """A whole model without a server: what embeds a sample, what decodes, and how its prompts are written."""

    embedder: SampleEmbedder
    decoder: Decoder
    end_ids: tuple[int, ...]

    @torch.inference_mode()
    def texts(self, samples: Sequence[Sample], *, max_tokens: int, batch_size: int = 16) -> Iterator[str]:
        """Greedy answers, in order. Raises NvlmError for an image that cannot be read."""
        remaining = iter(samples)
        while batch := list(islice(remaining, batch_size)):
            prompts = [self.embedder.prompt(sample) for sample in batch]
            for ids in greedy(self.decoder, prompts, end_ids=self.end_ids, max_tokens=max_tokens):
                yield self.embedder.prompts.tokenizer.decode(ids, skip_special_tokens=True)


def reference_model(recipe: Recipe) -> InProcessModel:
    """The unquantised model: encoder and decoder in torch, straight from the checkpoint, computing in float32."""
    tower = vision_tower_from_checkpoint(recipe.checkpoint, recipe.spec)

    def encode(tiles: Tiles) -> Embeddings:
        found: Embeddings = tower(torch.from_numpy(tiles.copy())).numpy()
        return found

    return _model(recipe, encode, decoder_from_checkpoint(recipe.checkpoint, recipe.spec))


def built_model(recipe: Recipe) -> InProcessModel:
    """What `nvlm build` made: the exported encoder in ONNX Runtime, the quantised decoder in the reference runtime.

    Raises NvlmError when it has not been built.
    """
    encoder = OnnxRuntimeEngine(recipe.vision_engine_folder / VISION_FILE)
    return _model(recipe, encoder, decoder_from_trtllm(recipe.decoder_folder))


def _model(recipe: Recipe, encode: Callable[[Tiles], Embeddings], decoder: Decoder) -> InProcessModel:
    prompts = PromptBuilder(recipe.tokenizer, recipe.spec, wrapper=recipe.profile.serving.wrapper)
    table = decoder.model.embed_tokens.weight
    reading = recipe.profile.serving.image_reading
    embedder = SampleEmbedder(
        prompts, recipe.spec.tiling, lambda tiles: _as_prompt_table(encode(tiles)), table, reading
    )
    return InProcessModel(embedder, decoder, recipe.spec.prompt.eos_token_ids)


def _as_prompt_table(embeddings: Embeddings) -> Embeddings:
    """Rounded to BF16, as they are on their way to a served decoder."""
    rounded: Embeddings = torch.from_numpy(embeddings).to(torch.bfloat16).float().numpy()
    return rounded


@dataclass
class GrowingCache:
    """Keys and values of one layer, of one batch that starts and ends together."""

    parts: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def update(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.parts.append((keys, values))
        all_keys, all_values = zip(*self.parts, strict=True)
        return torch.cat(all_keys, dim=2), torch.cat(all_values, dim=2)


def greedy(
    decoder: Decoder, prompts: Sequence[torch.Tensor], *, end_ids: Sequence[int], max_tokens: int
) -> list[list[int]]:
    """Return the likeliest next tokens after each prompt [tokens, hidden], up to an end id (left out) or `max_tokens`.

    Shorter prompts are padded on the left, so that every row takes its next token at the same column.
    """
    embeddings, is_prompt = _left_padded(prompts)
    positions = (is_prompt.cumsum(dim=1) - 1).clamp(min=0)
    mask = _prefill_mask(is_prompt)
    caches: list[LayerCache] = [GrowingCache() for _ in range(decoder.spec.layers)]
    answers: list[list[int]] = [[] for _ in prompts]
    running = torch.ones(len(prompts), dtype=torch.bool)
    ends = torch.tensor(end_ids)
    for _ in range(max_tokens):
        hidden = decoder.hidden_states(embeddings, positions=positions, mask=mask, caches=caches)
        tokens = decoder.lm_head(hidden[:, -1]).float().argmax(-1)
        running &= ~torch.isin(tokens, ends)
        if not bool(running.any()):
            break
        for row in running.nonzero()[:, 0].tolist():
            answers[row].append(int(tokens[row]))
        embeddings = decoder.embed(tokens[:, None])
        positions = positions[:, -1:] + 1
        is_prompt = functional.pad(is_prompt, (0, 1), value=True)
        mask = is_prompt[:, None, None]
    return answers


def _left_padded(prompts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings [prompts, width, hidden], and where they are not padding [prompts, width]."""
    width = max(map(len, prompts))
    padded = [functional.pad(prompt, (0, 0, width - len(prompt), 0)) for prompt in prompts]
    starts = torch.tensor([width - len(prompt) for prompt in prompts])
    return torch.stack(padded), torch.arange(width) >= starts[:, None]


def _prefill_mask(is_prompt: torch.Tensor) -> torch.Tensor:
    """Causal, padding hidden, [prompts, 1, width, width]. A padded column sees itself: softmax over nothing is NaN."""
    width = is_prompt.shape[1]
    causal = is_prompt[:, None] & torch.ones(width, width, dtype=torch.bool).tril()
    return (causal | torch.eye(width, dtype=torch.bool))[:, None]
