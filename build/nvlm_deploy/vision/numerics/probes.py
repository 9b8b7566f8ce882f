"""Inputs on which one number of an operation decides its result.

On ordinary activations a wrong epsilon, GELU's approximation, or scores that are 2 % too large drown in BF16's
rounding. Each operation of these kinds is therefore run once more, on one tile that is made up:
- a norm on tokens whose mean square is its epsilon: of a wrong epsilon the result is another by half of its error;
- GELU between -4 and -3, where its tanh approximation is off by a tenth and the sigmoid one by more;
- attention on scores at which one token weighs as much as all others: that weight follows the scale of the scores.
What is read is what the graph computes, however it spells it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from nvlm_deploy.model.spec import ModelSpec, VisionSpec
from nvlm_deploy.vision.numerics.operations import INPUT

Inputs = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Probe:
    """`inputs` makes the probe's from an operation's ordinary ones, by point, of one tile: [1, ...]."""

    what: str
    inputs: Callable[[ModelSpec, Inputs], dict[str, torch.Tensor]]


def largest_probe_score(spec: ModelSpec) -> float:
    """Of the attention probe: where exp(2 score) is the number of all other tokens."""
    return math.log(max(2, spec.vision.positions - 1)) / 2


def _of_mean_square(x: torch.Tensor, mean_square: float, channels: int) -> torch.Tensor:
    """Every token scaled so that its first channels have this mean square; tokens of zeros become one value."""
    found = x[..., :channels].square().mean(-1, keepdim=True).sqrt()
    flat = torch.full_like(x, math.sqrt(mean_square))
    return torch.where(found > 0, x * (math.sqrt(mean_square) / found.clamp(min=1e-30)), flat)


def _block_norm(point: str) -> Callable[[ModelSpec, Inputs], dict[str, torch.Tensor]]:
    def inputs(spec: ModelSpec, given: Inputs) -> dict[str, torch.Tensor]:
        return {point: _of_mean_square(given[point], spec.vision.norm_epsilon, spec.vision.hidden_size)}

    return inputs


def _qk_norm(spec: ModelSpec, given: Inputs) -> dict[str, torch.Tensor]:
    vision = spec.vision
    parts = [
        _of_mean_square(part, vision.norm_epsilon, vision.heads * vision.head_size)
        for part in given["qkv"].chunk(3, dim=-1)
    ]
    return {"qkv": torch.cat(parts, dim=-1)}


def _layer_norm(spec: ModelSpec, given: Inputs) -> dict[str, torch.Tensor]:
    x = given["pixel_shuffle"]
    centred = x - x.mean(-1, keepdim=True)
    return {"pixel_shuffle": _of_mean_square(centred, spec.projector.norm_epsilon, x.shape[-1])}


def _gelu(point: str) -> Callable[[ModelSpec, Inputs], dict[str, torch.Tensor]]:
    def inputs(_: ModelSpec, given: Inputs) -> dict[str, torch.Tensor]:
        x = given[point]
        return {point: torch.linspace(-4, -3, x.numel()).reshape(x.shape)}

    return inputs


def _attention(spec: ModelSpec, given: Inputs) -> dict[str, torch.Tensor]:
    """The first token has the highest score with every token, and it alone a value."""
    vision = spec.vision
    q = _in_first_channels(given["q_norm"], vision)
    # the scale of the scores is shared between the two, so that neither is out of a 16-bit type's range
    q *= math.sqrt(largest_probe_score(spec) * math.sqrt(vision.head_size))
    k = -q
    k[:, 0] = q[:, 0]
    value = torch.zeros_like(q)
    value[:, 0] = 1
    return {"q_norm": q, "k_norm": k, "qkv": torch.cat([q, k, value], dim=-1)}


def _in_first_channels(x: torch.Tensor, vision: VisionSpec) -> torch.Tensor:
    """1 in the first channel of every head, else 0."""
    ones = torch.zeros_like(x)
    ones[..., :: vision.head_size] = 1
    return ones


_EPSILON, _KIND, _DIVISOR = "where its epsilon counts", "where its approximations differ", "on the scale of its scores"

PROBES: Mapping[str, Probe] = {
    "norm1": Probe(_EPSILON, _block_norm(INPUT)),
    "q_norm": Probe(_EPSILON, _qk_norm),
    "k_norm": Probe(_EPSILON, _qk_norm),
    "norm2": Probe(_EPSILON, _block_norm("attention_residual")),
    "projector_norm": Probe(_EPSILON, _layer_norm),
    "gelu": Probe(_KIND, _gelu("fc1")),
    "projector_gelu": Probe(_KIND, _gelu("projector_fc1")),
    "attention": Probe(_DIVISOR, _attention),
}
