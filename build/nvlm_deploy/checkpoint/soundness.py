"""Values that a checkpoint's tensors cannot have: NaN, infinity, or nothing but zeros where a model learns."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from nvlm_deploy.errors import NvlmError

# matrices, and the scales of norms; a bias or a layer scale may be zero and mean it
_NEVER_ZERO = (".weight", ".position_embedding")


class SoundChunks:
    """Chunks of one tensor, looked at as they pass; `amax` is a float32 scalar, the whole tensor's after the last.

    Raises NvlmError at the first value that is not finite, and behind the last chunk when all were zero of what never
    is.
    """

    def __init__(self, name: str, chunks: Iterator[torch.Tensor]) -> None:
        self.name, self.amax, self._chunks = name, torch.zeros(()), chunks

    def __iter__(self) -> Iterator[torch.Tensor]:
        for chunk in self._chunks:
            if chunk.numel():
                self.amax = torch.maximum(self.amax, magnitude(chunk))
            _require_finite(self.name, self.amax.item())
            yield chunk
        if self.name.endswith(_NEVER_ZERO):
            require_weight_amax(self.name, self.amax.item())


def require_weight_amax(name: str, amax: float) -> None:
    """Raises NvlmError for a weight that cannot be right: not finite, or nothing but zeros."""
    _require_finite(name, amax)
    if amax == 0:
        raise NvlmError(
            f"tensor {name} is all zeros", hint="a download that stopped early looks like this: fetch its shard again"
        )


def magnitude(x: torch.Tensor) -> torch.Tensor:
    """Largest absolute value, a float32 scalar; NaN if there is one. No copy of x is made, unlike x.abs().max()."""
    low, high = x.aminmax()
    return torch.maximum(-low, high).float()


def _require_finite(name: str, amax: float) -> None:
    if not amax < float("inf"):
        raise NvlmError(
            f"tensor {name} holds NaN or infinity",
            hint="the checkpoint is damaged: compare its shards' SHA-256 with the publisher's and fetch them again",
        )
