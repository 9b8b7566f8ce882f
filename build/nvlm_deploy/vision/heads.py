"""The dummy heads of the released weights, told apart from the real ones (facts nvlm-d.md section 2, trap 1)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from nvlm_deploy.model.spec import VisionSpec

if TYPE_CHECKING:
    import torch

    from nvlm_deploy.checkpoint.reader import Checkpoint

PADDED_TENSORS = ("attn.qkv.weight", "attn.q_norm.weight", "attn.k_norm.weight", "attn.proj.weight")


def split_heads(name: str, tensor: torch.Tensor, vision: VisionSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """What belongs to the real heads and what to the dummy heads, which trail in each of q, k and v.

    The dummy part of a tensor without heads is empty.
    """
    real, padded = vision.heads * vision.head_size, vision.attention_width
    if name.endswith("attn.qkv.weight"):
        blocks = tensor.unflatten(0, (3, padded))
        return blocks[:, :real].flatten(0, 1), blocks[:, real:].flatten(0, 1)
    if name.endswith(PADDED_TENSORS):
        return tensor[..., :real], tensor[..., real:]
    return tensor, tensor[:0]


def without_dummy_heads(name: str, tensor: torch.Tensor, vision: VisionSpec) -> torch.Tensor:
    """The tensor for a tower of `pruned(vision)`. Exact only where `nonzero_dummy_tensors` finds none."""
    return split_heads(name, tensor, vision)[0].contiguous()


def pruned(vision: VisionSpec) -> VisionSpec:
    """The same encoder with its real heads only."""
    return replace(vision, padded_heads=vision.heads)


def nonzero_dummy_tensors(checkpoint: Checkpoint, vision: VisionSpec) -> list[str]:
    """Names of tensors whose dummy heads are not exactly zero: while there is one, pruning would change the result."""
    padded = [name for name in checkpoint.names if name.startswith("vision_model.") and name.endswith(PADDED_TENSORS)]
    return [name for name in padded if split_heads(name, checkpoint.tensor(name), vision)[1].any()]
