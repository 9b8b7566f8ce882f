"""From a row of logits to the next token. Each sequence has its own stream of random numbers, so that a seed gives the
same tokens whatever else is in the batch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.serving.word_list import Word, ends_with

# TensorRT-LLM's kernels hold no more candidates than this
MAX_TOP_K = 1024


@dataclass(frozen=True)
class SamplingSettings:
    """The sampling inputs of contract C.3; the defaults are greedy search.

    `top_k` 0 means every token; `top_k` 1, or 0 together with `top_p` 0, is greedy (TensorRT-LLM's rule).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_tokens: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            if not math.isfinite(getattr(self, field.name)):
                raise NvlmError(f"{field.name} is {getattr(self, field.name)}, expected a finite number")
        _require(self.temperature > 0, "temperature", self.temperature, "above 0 (greedy search is runtime_top_k 1)")
        _require(0 <= self.top_k <= MAX_TOP_K, "runtime_top_k", self.top_k, f"0 to {MAX_TOP_K}")
        _require(0 <= self.top_p <= 1, "runtime_top_p", self.top_p, "0 to 1")
        _require(self.repetition_penalty > 0, "repetition_penalty", self.repetition_penalty, "above 0")
        _require(self.min_tokens >= 0, "min_tokens", self.min_tokens, "at least 0")

    @property
    def is_greedy(self) -> bool:
        """Whether the best token is always taken."""
        return self.top_k == 1 or (self.top_k == 0 and self.top_p == 0)

    @property
    def has_penalties(self) -> bool:
        """Whether logits depend on the tokens so far."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


def _require(holds: bool, name: str, value: float, expected: str) -> None:
    if not holds:
        raise NvlmError(f"{name} is {value}, expected {expected}")


GREEDY = SamplingSettings()


class Sampler:
    """Picks the tokens of one sequence, in order."""

    def __init__(
        self,
        settings: SamplingSettings,
        prompt: Sequence[int],
        *,
        end_id: int,
        further_ends: Sequence[int] = (),
        bad_words: Sequence[Word] = (),
    ) -> None:
        """`prompt` may hold ids beyond the vocabulary (visual tokens); penalties pass over them.

        Neither `end_id` nor `further_ends` comes among the first `min_tokens` tokens, as in transformers.
        """
        self.settings = settings
        self.end_ids = (end_id, *further_ends)
        self.bad_words = tuple(bad_words)
        self.generated: list[int] = []
        self._prompt = frozenset(prompt) if settings.has_penalties else frozenset[int]()
        self._random = torch.Generator().manual_seed(settings.seed % 2**63)

    def next_token(self, logits: torch.Tensor) -> int:
        """The token after `logits` [vocab]; remembered as generated."""
        adjusted = self._adjusted(logits)
        token = int(adjusted.argmax()) if self.settings.is_greedy else self._drawn(adjusted)
        self.generated.append(token)
        return token

    def _adjusted(self, logits: torch.Tensor) -> torch.Tensor:
        if not self._changes_logits():
            return logits
        adjusted = logits.to("cpu", torch.float32, copy=True)
        if self.settings.has_penalties:
            self._penalise(adjusted)
        for token in self._banned():
            if 0 <= token < adjusted.numel():  # -1 says that there is no end id
                adjusted[token] = -math.inf
        return adjusted

    def _changes_logits(self) -> bool:
        settings = self.settings
        return settings.has_penalties or bool(self.bad_words) or len(self.generated) < settings.min_tokens

    def _banned(self) -> list[int]:
        banned = [word[-1] for word in self.bad_words if ends_with(self.generated, word[:-1])]
        return [*banned, *self.end_ids] if len(self.generated) < self.settings.min_tokens else banned

    def _penalise(self, logits: torch.Tensor) -> None:
        """Repetition counts prompt and answer (Keskar et al. 2019); presence and frequency the answer only (OpenAI)."""
        counts = Counter(self.generated)
        seen = torch.tensor(
            [token for token in self._prompt | counts.keys() if token < logits.numel()], dtype=torch.long
        )
        penalty = self.settings.repetition_penalty
        logits[seen] = torch.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
        for token, count in counts.items():
            logits[token] -= self.settings.presence_penalty + count * self.settings.frequency_penalty

    def _drawn(self, logits: torch.Tensor) -> int:
        """Temperature, then top-k, then top-p over what is left; drawn by inverting the cumulative distribution."""
        scaled = logits.to("cpu", torch.float64) / self.settings.temperature
        values, tokens = scaled.sort(descending=True, stable=True)
        if self.settings.top_k:
            values = values[: self.settings.top_k]
        probabilities = values.softmax(dim=0)
        if 0 < self.settings.top_p < 1:
            before = probabilities.cumsum(dim=0) - probabilities
            probabilities = probabilities[before < self.settings.top_p]
        cumulative = probabilities.cumsum(dim=0)
        draw = torch.rand((), generator=self._random, dtype=torch.float64) * cumulative[-1]
        position = int(torch.searchsorted(cumulative, draw, right=True))
        return int(tokens[min(position, len(cumulative) - 1)])
