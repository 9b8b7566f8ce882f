"""The float32 reference of the numerics gate: the tower as operations on named points.

Written a second time, from facts nvlm-d.md section 3 and not from model/vision.py, which is what gets exported: a
mistake there, or in a copy of it, must not be its own judge. Weights are the checkpoint's, dummy heads included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional

from nvlm_deploy.checkpoint.reader import Checkpoint
from nvlm_deploy.model.spec import IMAGENET_MEAN, IMAGENET_STD, ModelSpec
from nvlm_deploy.vision.stages import Kind, Stage

Compute = Callable[..., torch.Tensor]

# what comes into the stage, among the inputs of its operations
INPUT = "input"
# the point that is the stage's output
OUTPUT = "output"
EMBEDDING_WEIGHTS = (
    "embeddings.patch_embedding.weight",
    "embeddings.patch_embedding.bias",
    "embeddings.class_embedding",
    "embeddings.position_embedding",
)


@dataclass(frozen=True)
class Operation:
    """What lies between points: computes `point` from other points and, by their names there, weights of its stage."""

    point: str
    label: str
    inputs: tuple[str, ...]
    compute: Compute
    weights: tuple[str, ...] = ()
    is_norm: bool = False
    may_be_fp8: bool = False


@dataclass(frozen=True)
class Parameters:
    """What a stage computes with: its weights in float32 by their names in the stage, and the model's numbers."""

    weights: Mapping[str, torch.Tensor]
    spec: ModelSpec


def parameters_of(stage: Stage, checkpoint: Checkpoint, spec: ModelSpec) -> Parameters:
    """Raises NvlmError for missing or misshapen weights."""
    return Parameters(stage.from_checkpoint(checkpoint, spec).state_dict(), spec)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float, divisor: int) -> torch.Tensor:
    """Mean square over the first `divisor` channels: dummy heads do not count (trap 2)."""
    mean_square = x[..., :divisor].square().sum(-1, keepdim=True) / divisor
    return x / (mean_square + epsilon).sqrt() * weight


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, epsilon: float) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight + bias


def _pixels(_: Parameters, tiles: torch.Tensor) -> torch.Tensor:
    channels = [
        (tiles[..., channel].float() / 255 - mean) / deviation
        for channel, (mean, deviation) in enumerate(zip(IMAGENET_MEAN, IMAGENET_STD, strict=True))
    ]
    return torch.stack(channels, dim=1)


def _patch_embedding(own: Parameters, pixels: torch.Tensor) -> torch.Tensor:
    size = own.spec.vision.patch_size
    patches = functional.unfold(pixels, size, stride=size).transpose(1, 2)
    kernel = own.weights["embeddings.patch_embedding.weight"].flatten(1)
    embedded = functional.linear(patches, kernel, own.weights["embeddings.patch_embedding.bias"])
    class_token = own.weights["embeddings.class_embedding"].expand(len(pixels), 1, -1)
    states: torch.Tensor = torch.cat([class_token, embedded], dim=1) + own.weights["embeddings.position_embedding"]
    return states


def _block_norm(name: str) -> Compute:
    def norm(own: Parameters, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, own.weights[f"{name}.weight"], own.spec.vision.norm_epsilon, own.spec.vision.hidden_size)

    return norm


def _qk_norm(name: str, part: int) -> Compute:
    def norm(own: Parameters, qkv: torch.Tensor) -> torch.Tensor:
        x, vision = qkv.chunk(3, dim=-1)[part], own.spec.vision
        return rms_norm(x, own.weights[f"{name}.weight"], vision.norm_epsilon, vision.heads * vision.head_size)

    return norm


def _linear(name: str) -> Compute:
    def linear(own: Parameters, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, own.weights[f"{name}.weight"], own.weights.get(f"{name}.bias"))

    return linear


def _attention(own: Parameters, *inputs: torch.Tensor) -> torch.Tensor:
    """q and k normalised, and qkv, whose last third is v -> heads side by side."""
    q, k, qkv = inputs
    value = _by_head(qkv.chunk(3, dim=-1)[2], own.spec)
    attended = (_scores(own.spec, q, k).softmax(-1) @ value).transpose(1, 2)
    side_by_side: torch.Tensor = attended.flatten(2)
    return side_by_side


def _scores(spec: ModelSpec, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    products: torch.Tensor = _by_head(q, spec) @ _by_head(k, spec).transpose(-1, -2)
    return products / math.sqrt(spec.vision.head_size)


def _by_head(x: torch.Tensor, spec: ModelSpec) -> torch.Tensor:
    by_head: torch.Tensor = x.unflatten(-1, (-1, spec.vision.head_size)).transpose(1, 2)
    return by_head


def largest_score(spec: ModelSpec, q: torch.Tensor, k: torch.Tensor) -> float:
    """The largest magnitude that goes into softmax."""
    return float(_scores(spec, q, k).abs().max())


def _residual(scale: str) -> Compute:
    def add(own: Parameters, x: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
        return x + own.weights[scale] * branch

    return add


def _pixel_shuffle(own: Parameters, states: torch.Tensor) -> torch.Tensor:
    """Version 2: top-left, top-right, bottom-left, bottom-right of each square, squares in row-major order."""
    grid = states[:, 1:].unflatten(1, (own.spec.vision.grid, own.spec.vision.grid))
    corners = [grid[:, row::2, column::2] for row in (0, 1) for column in (0, 1)]
    return torch.cat(corners, dim=-1).flatten(1, 2)


def _projector_norm(own: Parameters, x: torch.Tensor) -> torch.Tensor:
    return layer_norm(x, own.weights["mlp1.0.weight"], own.weights["mlp1.0.bias"], own.spec.projector.norm_epsilon)


def _gelu(_: Parameters, x: torch.Tensor) -> torch.Tensor:
    return x * (1 + (x / 2**0.5).erf()) / 2


def _norm_operation(point: str, label: str, source: str, compute: Compute, *names: str) -> Operation:
    return Operation(point, label, (source,), compute, names, is_norm=True)


def _linear_operation(point: str, label: str, source: str, name: str, *, has_bias: bool = True) -> Operation:
    weights = (f"{name}.weight", f"{name}.bias") if has_bias else (f"{name}.weight",)
    return Operation(point, label, (source,), _linear(name), weights, may_be_fp8=True)


OPERATIONS: Mapping[Kind, tuple[Operation, ...]] = {
    "prologue": (
        Operation("pixels", "normalisation", (INPUT,), _pixels),
        Operation(OUTPUT, "patch embedding", ("pixels",), _patch_embedding, EMBEDDING_WEIGHTS),
    ),
    "block": (
        _norm_operation("norm1", "norm1", INPUT, _block_norm("norm1"), "norm1.weight"),
        _linear_operation("qkv", "qkv projection", "norm1", "attn.qkv", has_bias=False),
        _norm_operation("q_norm", "QK-norm (q)", "qkv", _qk_norm("attn.q_norm", 0), "attn.q_norm.weight"),
        _norm_operation("k_norm", "QK-norm (k)", "qkv", _qk_norm("attn.k_norm", 1), "attn.k_norm.weight"),
        Operation("attention", "attention", ("q_norm", "k_norm", "qkv"), _attention, may_be_fp8=True),
        _linear_operation("proj", "output projection", "attention", "attn.proj"),
        Operation("attention_residual", "attention residual", (INPUT, "proj"), _residual("ls1"), ("ls1",)),
        _norm_operation("norm2", "norm2", "attention_residual", _block_norm("norm2"), "norm2.weight"),
        _linear_operation("fc1", "fc1", "norm2", "mlp.fc1"),
        Operation("gelu", "GELU", ("fc1",), _gelu),
        _linear_operation("fc2", "fc2", "gelu", "mlp.fc2"),
        Operation(OUTPUT, "MLP residual", ("attention_residual", "fc2"), _residual("ls2"), ("ls2",)),
    ),
    "epilogue": (
        Operation("pixel_shuffle", "pixel shuffle", (INPUT,), _pixel_shuffle),
        _norm_operation(
            "projector_norm", "projector LayerNorm", "pixel_shuffle", _projector_norm, "mlp1.0.weight", "mlp1.0.bias"
        ),
        _linear_operation("projector_fc1", "projector fc1", "projector_norm", "mlp1.1", has_bias=False),
        Operation("projector_gelu", "projector GELU", ("projector_fc1",), _gelu),
        _linear_operation(OUTPUT, "projector fc2", "projector_gelu", "mlp1.3", has_bias=False),
    ),
}


def point_name(stage: Stage, point: str) -> str:
    """The full name of an operation's point or input (vision/stages.py); INPUT has none."""
    if point == OUTPUT:
        return stage.name
    return f"{stage.name}.{point}" if stage.kind == "block" else point
