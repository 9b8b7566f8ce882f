"""FP8 weights of the encoder: which tensors, their scales, their codes.

Quantised are the four linears of every block: 98 % of the encoder's arithmetic. The patch convolution (0.1 %) stays in
the base type, as pixels are where errors start; so does the projector, 3 % of the arithmetic, which writes the rows
that the decoder reads: ModelOpt leaves InternViT out by its name and would quantise `mlp1`, whose name it does not know
(contract E), which is the wrong way round.

Every scale is a bf16 number, rounded up so that amax still fits: a graph in bf16 and one lowered to float32 then have
the same scales and compute the same codes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.model.fp8 import scale_from_amax, to_e4m3
from nvlm_deploy.vision.calibrate import VisionCalibration
from nvlm_deploy.vision.external_data import Weight, weight_of_tensor
from nvlm_deploy.vision.qdq import LINEAR_INPUTS, Fp8Choice

_LINEARS = "|".join(map(re.escape, LINEAR_INPUTS))
_LINEAR_WEIGHT = re.compile(
    rf"(?P<block>vision_model\.encoder\.layers\.(?P<layer>\d+)\.)(?P<linear>{_LINEARS})\.weight"
)


def quantised_weights(
    weights: Sequence[Weight], calibration: VisionCalibration, choice: Fp8Choice, *, head_size: int
) -> list[Weight]:
    """The weights of the graph that `quantise_block` made, from those of the graph before it.

    A linear's weight becomes e4m3 codes, its scales follow it in the base type. Nothing is read before a weight's
    chunks are asked for; then a linear's are read twice, its amax being needed first. Raises NvlmError when the
    calibration lacks a layer or was made with other weights.
    """
    return [part for weight in weights for part in _parts(weight, calibration, choice, head_size)]


def _parts(weight: Weight, calibration: VisionCalibration, choice: Fp8Choice, head_size: int) -> Iterator[Weight]:
    match = _LINEAR_WEIGHT.fullmatch(weight.name)
    if match is None:
        yield weight
        return
    linear, block, point = match["linear"], match["block"], f"block.{match['layer']}"
    source = _LinearWeight(weight, _calibrated(calibration, weight.name), choice)
    yield Weight(weight.name, torch.float8_e4m3fn, weight.shape, source.codes)
    yield source.scale_weight
    yield _scale(f"{block}{linear}.input_scale", calibration, f"{point}.{LINEAR_INPUTS[linear]}", weight.dtype)
    if choice.attention and linear == "attn.qkv":
        factors = {"q": head_size**-0.5, "k": 1.0, "v": 1.0}
        for name, factor in factors.items():
            source_point = f"{point}.{name}" if name == "v" else f"{point}.{name}_norm"
            yield _scale(f"{block}attn.{name}_scale", calibration, source_point, weight.dtype, factor)


@dataclass(frozen=True)
class _LinearWeight:
    """A linear's weight [out, in] on its way to e4m3."""

    weight: Weight
    calibrated_amax: float
    choice: Fp8Choice

    @property
    def scale_weight(self) -> Weight:
        per_channel = self.choice.weight_scales == "per_channel"
        name = self.weight.name.removesuffix(".weight") + ".weight_scale"
        shape = self.weight.shape[:1] if per_channel else ()
        return Weight(name, self.weight.dtype, shape, lambda: iter((self.scale.to(self.weight.dtype),)))

    def codes(self) -> Iterator[torch.Tensor]:
        row = 0
        for chunk in self.weight.chunks():
            rows = self.scale[row : row + len(chunk), None] if self.scale.ndim else self.scale
            yield to_e4m3(chunk, rows)
            row += len(chunk)

    @cached_property
    def scale(self) -> torch.Tensor:
        """float32 [out] or []. Raises NvlmError when these are not the weights that were calibrated."""
        amax = torch.cat([_row_amax(chunk) for chunk in self.weight.chunks()])
        largest = amax.max()
        if largest != torch.tensor(self.calibrated_amax).to(self.weight.dtype).float():
            raise NvlmError(
                f"{self.weight.name} has amax {largest:.6g}, {self.calibrated_amax:.6g} when calibrated: "
                "the calibration is of another checkpoint",
                hint="calibrate this checkpoint again",
            )
        return bf16_scale(amax if self.choice.weight_scales == "per_channel" else largest)


def _row_amax(chunk: torch.Tensor) -> torch.Tensor:
    low, high = chunk.aminmax(dim=1)
    return torch.maximum(-low, high).float()


def bf16_scale(amax: torch.Tensor) -> torch.Tensor:
    """float32 dequantisation multipliers that are bf16 numbers, the next above amax / 448; 1 where amax is 0."""
    # a GPU may take a subnormal scale for zero
    scale = scale_from_amax(amax).clamp(min=torch.finfo(torch.float32).smallest_normal)
    return ((scale.view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)


def _scale(name: str, calibration: VisionCalibration, point: str, dtype: torch.dtype, factor: float = 1.0) -> Weight:
    amax = torch.tensor(_calibrated(calibration, point) * factor)
    return weight_of_tensor(name, bf16_scale(amax).to(dtype))


def _calibrated(calibration: VisionCalibration, name: str) -> float:
    if name not in calibration.amax:
        raise NvlmError(f"the vision calibration has no amax of {name}", hint="calibrate this checkpoint again")
    amax = calibration.amax[name]
    if not 0 < amax < float("inf"):
        raise NvlmError(f"the vision calibration's amax of {name} is {amax}", hint="calibrate this checkpoint again")
    return amax
