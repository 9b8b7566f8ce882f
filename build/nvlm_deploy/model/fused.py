"""Linears that see the same input joined into one, as TensorRT-LLM joins them: fewer and larger products a token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from nvlm_deploy.model.decoder import Decoder, DecoderLayer
from nvlm_deploy.model.fp8_linear import Fp8Linear
from nvlm_deploy.model.linear import InferenceLinear

if TYPE_CHECKING:
    from collections.abc import Sequence

# module of a layer -> what is joined, in the order of its rows, and the name of the joint linear
_GROUPS = (
    ("self_attn", ("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    ("mlp", ("gate_proj", "up_proj"), "gate_up_proj"),
)


def fused(decoder: Decoder) -> Decoder:
    """The same decoder, changed in place; a layer at a time is in memory twice. It has no linears of the old names.

    FP8 linears whose scales differ stay apart: one scale would change their codes (contract A.6).
    """
    for layer in decoder.model.layers:
        if isinstance(layer, DecoderLayer):
            for owner, names, joint in _GROUPS:
                _fuse(layer.get_submodule(owner), names, joint)
    return decoder


def _fuse(owner: nn.Module, names: Sequence[str], joint: str) -> None:
    linears = [owner.get_submodule(name) for name in names]
    if not all(isinstance(linear, Fp8Linear) for linear in linears):
        setattr(owner, joint, _joined_plain([linear for linear in linears if isinstance(linear, nn.Linear)]))
    elif _share_scales(parts := [linear for linear in linears if isinstance(linear, Fp8Linear)]):
        setattr(owner, joint, _joined_fp8(parts))
    else:
        return
    for name in names:
        delattr(owner, name)


def _joined_plain(linears: Sequence[nn.Linear]) -> InferenceLinear:
    weight = torch.cat([linear.weight for linear in linears])
    bias = _joined_biases(linears)
    with torch.device("meta"):
        joint = InferenceLinear(weight.shape[1], weight.shape[0], bias=bias is not None)
    state = {"weight": weight} | ({} if bias is None else {"bias": bias})
    joint.load_state_dict(state, assign=True)
    return joint.requires_grad_(False)


def _joined_fp8(linears: Sequence[Fp8Linear]) -> Fp8Linear:
    first = linears[0]
    per_channel = first.weight_scale.ndim == 1
    scale = torch.cat([linear.weight_scale for linear in linears]) if per_channel else first.weight_scale
    # bytes: torch.cat of e4m3 is not everywhere
    codes = torch.cat([linear.weight.view(torch.uint8) for linear in linears]).view(first.weight.dtype)
    return Fp8Linear(codes, scale, first.activation_scale, _joined_biases(linears))


def _joined_biases(linears: Sequence[nn.Linear | Fp8Linear]) -> torch.Tensor | None:
    biases = [linear.bias for linear in linears if linear.bias is not None]
    return torch.cat(biases) if biases else None


def _share_scales(linears: Sequence[Fp8Linear]) -> bool:
    """Of activations, and of weights unless each row has its own."""
    first = linears[0]
    return all(
        _equal(linear.activation_scale, first.activation_scale)
        and linear.weight_scale.ndim == first.weight_scale.ndim
        and (linear.weight_scale.ndim == 1 or _equal(linear.weight_scale, first.weight_scale))
        for linear in linears
    )


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return (one is None) == (other is None) and (one is None or other is None or torch.equal(one, other))
