"""The slotted KV cache: room for a fixed number of sequences, each a row that grows in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nvlm_deploy.model.decoder import LayerCache
from nvlm_deploy.model.spec import DecoderSpec


class SlottedKvCache:
    """Keys and values of a fixed number of sequences; all memory is taken at once.

    With dtype float8_e4m3fn it holds the codes that a decoder with an FP8 cache gives it, a byte each.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        *,
        slots: int,
        max_seq_len: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (slots, spec.kv_heads, max_seq_len, spec.head_size)
        self.slots, self.max_seq_len, self.dtype = slots, max_seq_len, dtype
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(spec.layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(spec.layers)]

    def prefill_views(self, slot: int) -> list[LayerCache]:
        """One cache per layer for the first tokens of `slot`."""
        return [_PrefillView(keys[slot], values[slot]) for keys, values in zip(self.keys, self.values, strict=True)]

    def clear(self, slot: int, tokens: int) -> None:
        """Forget a sequence. Masked keys weigh zero, but zero times a NaN left behind would be NaN."""
        for cache in (*self.keys, *self.values):
            cache[slot, :, :tokens] = 0

    def decode_views(self, slots: Sequence[int], positions: torch.Tensor, total: int) -> list[LayerCache]:
        """One cache per layer for one token each of `slots`, at `positions` [sequences], all below `total`."""
        index = torch.tensor(slots, device=positions.device)
        is_view = list(slots) == list(range(len(slots)))
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
