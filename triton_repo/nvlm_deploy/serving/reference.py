"""The reference decoder as the scheduler's engine: a slotted KV cache makes one forward pass of many sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.model.decoder import Decoder, LayerCache
from nvlm_deploy.model.spec import DecoderSpec


class SlottedKvCache:
    """Keys and values of a fixed number of sequences; all memory is taken at once."""

    def __init__(self, spec: DecoderSpec, *, slots: int, max_seq_len: int, dtype: torch.dtype) -> None:
        shape = (slots, spec.kv_heads, max_seq_len, spec.head_size)
        self.max_seq_len = max_seq_len
        self.keys = [torch.zeros(shape, dtype=dtype) for _ in range(spec.layers)]
        self.values = [torch.zeros(shape, dtype=dtype) for _ in range(spec.layers)]

    def prefill_views(self, slot: int) -> list[LayerCache]:
        """One cache per layer for the first tokens of `slot`."""
        return [_PrefillView(keys[slot], values[slot]) for keys, values in zip(self.keys, self.values, strict=True)]

    def clear(self, slot: int, tokens: int) -> None:
        """Forget a sequence. Masked keys weigh zero, but zero times a NaN left behind would be NaN."""
        for cache in (*self.keys, *self.values):
            cache[slot, :, :tokens] = 0

    def decode_views(self, slots: Sequence[int], positions: torch.Tensor) -> list[LayerCache]:
        """One cache per layer for one token each of `slots`, at `positions` [sequences]."""
        index = torch.tensor(slots)
        is_view = list(slots) == list(range(len(slots)))
        total = int(positions.max()) + 1
        return [
            _DecodeView(keys, values, index, positions, total, is_view)
            for keys, values in zip(self.keys, self.values, strict=True)
        ]


@dataclass(frozen=True)
class _PrefillView:
    keys: torch.Tensor
    values: torch.Tensor

    def update(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = keys.shape[2]
        self.keys[:, :tokens] = keys[0]
        self.values[:, :tokens] = values[0]
        return keys, values


@dataclass(frozen=True)
class _DecodeView:
    keys: torch.Tensor
    values: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor
    total: int
    is_view: bool

    def update(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys[self.slots, :, self.positions] = keys[:, :, 0].to(self.keys.dtype)
        self.values[self.slots, :, self.positions] = values[:, :, 0].to(self.values.dtype)
        return self._batch(self.keys), self._batch(self.values)

    def _batch(self, cache: torch.Tensor) -> torch.Tensor:
        rows = cache[: len(self.slots)] if self.is_view else cache[self.slots]
        return rows[:, :, : self.total]


class ReferenceEngine:
    """The scheduler's engine on a torch decoder."""

    def __init__(self, decoder: Decoder, cache: SlottedKvCache) -> None:
        self.decoder = decoder
        self.cache = cache
        self.slots = cache.keys[0].shape[0]
        self._lengths = [0] * self.slots

    def warm_up(self) -> None:
        """One short sequence: torch sets its kernels up at their first use."""
        self.prefill(0, [0, 0], None)
        self.decode([0], [0])
        self.release(0)

    @torch.inference_mode()
    def prefill(self, slot: int, prompt: Sequence[int], table: torch.Tensor | None) -> torch.Tensor:
        """Logits [vocab] after the whole prompt."""
        embeddings = prompt_embeddings(self.decoder, torch.tensor(prompt), table)
        hidden = self.decoder.hidden_states(embeddings[None], caches=self.cache.prefill_views(slot))
        self._lengths[slot] = len(prompt)
        return self._logits(hidden[0, -1])

    @torch.inference_mode()
    def decode(self, slots: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
        """Logits [sequences, vocab]; the batch is one forward pass."""
        positions = torch.tensor([self._lengths[slot] for slot in slots])
        reachable = torch.arange(int(positions.max()) + 1) <= positions[:, None]
        hidden = self.decoder.hidden_states(
            self.decoder.embed(torch.tensor(tokens)[:, None]),
            positions=positions[:, None],
            mask=reachable[:, None, None],
            caches=self.cache.decode_views(slots, positions),
        )
        for slot in slots:
            self._lengths[slot] += 1
        return self._logits(hidden[:, -1])

    def release(self, slot: int) -> None:
        """Free the slot for the next sequence."""
        self.cache.clear(slot, self._lengths[slot])
        self._lengths[slot] = 0

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.decoder.lm_head(hidden).float()
        return logits


def prompt_embeddings(decoder: Decoder, ids: torch.Tensor, table: torch.Tensor | None) -> torch.Tensor:
    """Embeddings [tokens, hidden]: id `vocab_size + n` is row n of `table` (contract C.1).

    Raises NvlmError when an id refers to a row that the table does not have.
    """
    vocab_size = decoder.spec.vocab_size
    visual = ids >= vocab_size
    rows = 0 if table is None else table.shape[0]
    if bool(visual.any()) and int(ids.max()) - vocab_size >= rows:
        raise NvlmError(f"input_ids refer to row {int(ids.max()) - vocab_size} of a prompt table with {rows} rows")
    embeddings = decoder.embed(ids.masked_fill(visual, 0))
    if table is not None:
        embeddings[visual] = table[ids[visual] - vocab_size].to(embeddings.dtype)
    return embeddings
