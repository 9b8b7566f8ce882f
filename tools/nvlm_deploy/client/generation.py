"""How an answer is generated: the options of a request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from nvlm_deploy import tensors
from nvlm_deploy.client.values import number_for, words
from nvlm_deploy.tensors import TensorSpec

_NUMBERS = (
    tensors.MAX_TOKENS,
    tensors.TEMPERATURE,
    tensors.TOP_K,
    tensors.TOP_P,
    tensors.REPETITION_PENALTY,
    tensors.PRESENCE_PENALTY,
    tensors.FREQUENCY_PENALTY,
    tensors.MIN_TOKENS,
    tensors.SEED,
)
_WORDS = (tensors.STOP_WORDS, tensors.BAD_WORDS)


@dataclass(frozen=True)
class Generation:
    """How an answer is generated; None leaves the choice to the server (greedy, the profile's number of tokens).

    Numbers may be Python's or numpy's; `stop_words` and `bad_words` one str or a list or tuple of them. Making one
    raises NvlmError for a value of another type, or one that its tensor cannot hold; the server judges the rest.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop_words: Sequence[str] = ()
    bad_words: Sequence[str] = ()
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    min_tokens: int | None = None

    def __post_init__(self) -> None:
        for spec in _NUMBERS:
            value = getattr(self, spec.name)
            if value is not None:
                object.__setattr__(self, spec.name, number_for(spec, value))
        for spec in _WORDS:
            object.__setattr__(self, spec.name, words(spec.name, getattr(self, spec.name)))

    def tensors(self) -> Iterator[tuple[TensorSpec, Sequence[Any]]]:
        """What was given, as inputs of the ensemble."""
        for spec in _NUMBERS:
            value = getattr(self, spec.name)
            if value is not None:
                yield spec, [value]
        for spec in _WORDS:
            if given := getattr(self, spec.name):
                yield spec, [word.encode() for word in given]
