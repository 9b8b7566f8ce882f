"""TensorRT-LLM's word lists: int32 [2, n], all ids in a row, then where each word ends, filled up with -1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvlm_deploy.errors import NvlmError

Word = tuple[int, ...]


def packed_words(words: Sequence[Word]) -> NDArray[Any]:
    """int32 [2, n] of some words of token ids; without words a list of one empty column."""
    ids = [token for word in words for token in word] or [0]
    ends = np.cumsum([len(word) for word in words], dtype=np.int32)
    packed = np.full((2, len(ids)), -1, dtype=np.int32)
    packed[0] = ids
    packed[1, : len(ends)] = ends
    return packed


def unpacked_words(packed: NDArray[Any], *, name: str) -> tuple[Word, ...]:
    """The words of an int32 [2, n]; NvlmError naming the tensor when the ends do not ascend within n."""
    if packed.ndim != 2 or packed.shape[0] != 2:
        raise NvlmError(f"{name} has shape {list(packed.shape)}, expected [2, n]")
    ids, ends = packed.tolist()
    words, start = [], 0
    for end in (end for end in ends if end >= 0):
        if not start < end <= len(ids):
            raise NvlmError(f"{name}: word ends {ends} do not ascend within its {len(ids)} ids")
        words.append(tuple(ids[start:end]))
        start = end
    return tuple(words)


def single_tokens(words: Sequence[Word]) -> list[int]:
    """Return the ids of the words of one token: as stop words they are further end ids."""
    return [word[0] for word in words if len(word) == 1]


def ends_with(tokens: Sequence[int], word: Word) -> bool:
    """Whether `word` is the tail of `tokens`."""
    return len(word) <= len(tokens) and tuple(tokens[len(tokens) - len(word) :]) == word
