"""The dummy heads of the released weights, told apart from the real ones (facts nvlm-d.md section 2, trap 1)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from nvlm_deploy.model.spec import VisionSpec

if TYPE_CHECKING:
    import torch

    from nvlm_deploy.checkpoint.reader import Checkpoint

PADDED_TENSORS = ("attn.qkv.weight", "attn.q_norm.weight", "attn.k_norm.weight", "attn.proj.weight")


def real_chunks(checkpoint: Checkpoint, name: str, vision: VisionSpec) -> Iterator[torch.Tensor]:
    """A tensor for a tower of `pruned(vision)`, some rows at a time.

    Exact only where `nonzero_dummy_tensors` finds none.
    """
    if not name.endswith(PADDED_TENSORS):
        return checkpoint.chunks(name)
    return _chunks_of_heads(checkpoint, name, vision, slice(0, vision.heads * vision.head_size))


def _chunks_of_heads(checkpoint: Checkpoint, name: str, vision: VisionSpec, channels: slice) -> Iterator[torch.Tensor]:
    """Some channels of q, k, v or what is made of them: dummy heads trail in each of q, k and v."""
    if name.endswith("attn.proj.weight"):
        return (chunk[:, channels] for chunk in checkpoint.chunks(name))
    starts = range(0, checkpoint.shape(name)[0], vision.attention_width)
    return checkpoint.chunks(name, rows=[range(start + channels.start, start + channels.stop) for start in starts])


def pruned(vision: VisionSpec) -> VisionSpec:
    """The same encoder with its real heads only."""
    return replace(vision, padded_heads=vision.heads)


def nonzero_dummy_tensors(checkpoint: Checkpoint, vision: VisionSpec) -> list[str]:
    """Names of tensors whose dummy heads are not exactly zero: while there is one, pruning would change the result."""
    dummies = slice(vision.heads * vision.head_size, vision.attention_width)
    padded = [name for name in checkpoint.names if name.startswith("vision_model.") and name.endswith(PADDED_TENSORS)]
    return [
        name
        for name in padded
        if any(bool(chunk.any()) for chunk in _chunks_of_heads(checkpoint, name, vision, dummies))
    ]
