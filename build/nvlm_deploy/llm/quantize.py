"""Which scales a decoder's linears get and what their weights become, a few MB at a time.

FP8 has one static scale for a weight and one for its input, shared by a fused group; FP8_PER_CHANNEL_PER_TOKEN has one
for each row of a weight and none for its input, which the engine scales token by token (contract A.9).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from nvlm_deploy.checkpoint.reader import Checkpoint
from nvlm_deploy.checkpoint.soundness import SoundChunks
from nvlm_deploy.checkpoint.trtllm_layout import FP8, FP8_PER_CHANNEL, Layout
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.llm.calibrate import CalibrationResult
from nvlm_deploy.llm.observed import FUSED_LINEARS
from nvlm_deploy.model.decoder import PREFIX
from nvlm_deploy.model.fp8 import E4M3_MAX, scale_from_amax, to_e4m3

log = logging.getLogger(__name__)

# ModelOpt writes no smaller one (contract A.7): keys and values up to 448 keep e4m3's own steps
LEAST_KV_CACHE_SCALE = 1.0
# by bytes of a value: an integer as wide, and which of its bits is the value's sign
_BITS = {2: (torch.int16, -(1 << 15)), 4: (torch.int32, -(1 << 31))}


@dataclass(frozen=True)
class LinearScales:
    """Dequantisation multipliers, float32 [1]."""

    weight: torch.Tensor
    activation: torch.Tensor


def require_calibrated(layout: Layout, calibration: CalibrationResult | None) -> None:
    """Raises NvlmError when the layout needs an amax that the calibration has not, before anything is read."""
    if layout.quant_algo == FP8 and calibration is None:
        raise NvlmError(
            "FP8 with one static scale a tensor needs a calibration: an input's scale cannot be known from weights",
            hint=f"calibrate with samples, or choose {FP8_PER_CHANNEL}, which needs none",
        )
    for index in range(layout.spec.layers if calibration else 0):
        layer = f"model.layers.{index}"
        for group in FUSED_LINEARS if layout.quant_algo == FP8 else ():
            for linear in group:
                linear_scales(f"{layer}.{linear}", calibration)
        if layout.kv_cache_quant_algo:
            kv_cache_scale(layer, calibration)


def given_up(quant_algo: str | None, kv_cache_quant_algo: str | None) -> list[str]:
    """What a checkpoint of these loses for want of a calibration, in sentences for its user."""
    losses = []
    if quant_algo == FP8_PER_CHANNEL:
        losses.append(
            "no static activation scales: the engine finds a scale for every token at every linear, which takes time, "
            "and runs on Ada and Hopper only; nothing was checked against real inputs"
        )
    if kv_cache_quant_algo:
        losses.append(
            f"the FP8 KV cache has scale {LEAST_KV_CACHE_SCALE:g} unseen: keys and values beyond 448 are cut off"
        )
    return losses


def linear_scales(linear: str, calibration: CalibrationResult | None) -> LinearScales:
    """Static scales of a linear `model.layers.N.<linear>`, shared by its fused group.

    Were they not shared, TensorRT-LLM would requantise the fused weight with the larger one and lose precision
    (contract A.6).
    """
    layer, group = _fused_group(linear)
    amax = max(_calibrated(calibration, f"{layer}.{name}.weight") for name in group)
    activation = _calibrated(calibration, f"{layer}.{group[0]}.input")
    return LinearScales(scale_from_amax(torch.tensor([amax])), scale_from_amax(torch.tensor([activation])))


def kv_cache_scale(layer: str, calibration: CalibrationResult | None) -> torch.Tensor:
    """float32 [1] of a layer's keys and values alike, never below LEAST_KV_CACHE_SCALE.

    Without a calibration it is that, which loses something only where a key or value passes 448.
    """
    if calibration is None:
        return torch.tensor([LEAST_KV_CACHE_SCALE])
    amax = max(_calibrated(calibration, f"{layer}.self_attn.{which}") for which in ("keys", "values"))
    if amax > E4M3_MAX / 2:
        log.warning("%s: keys or values reach %.4g: an FP8 KV cache may cost accuracy", layer, amax)
    return scale_from_amax(torch.tensor([amax])).clamp(min=LEAST_KV_CACHE_SCALE)


def linear_chunks(checkpoint: Checkpoint, source: str, calibration: CalibrationResult | None) -> Iterator[torch.Tensor]:
    """Rows of a linear's weight as stored; at the end NvlmError when they cannot be what was calibrated."""
    chunks = SoundChunks(PREFIX + source, checkpoint.chunks(PREFIX + source))
    yield from chunks
    amax = chunks.amax.item()
    if calibration is not None and amax != _calibrated(calibration, source):
        raise NvlmError(
            f"{source} has amax {amax:.6g}, {calibration.amax[source]:.6g} when calibrated: "
            "the calibration is of another checkpoint",
            hint="calibrate this checkpoint again",
        )


def codes_and_row_scales(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 of rows [n, in] and the float32 scale [n] of each; a row of zeros gets 1."""
    scales = scale_from_amax(row_magnitudes(rows))
    return to_e4m3(rows, scales[:, None]), scales


def row_magnitudes(rows: torch.Tensor) -> torch.Tensor:
    """Largest absolute value of each row [n, in], of its type: [n].

    Floating-point bits without the sign are ordered as the values are; as integers that takes a third of the time.
    """
    bits, sign = _BITS[rows.dtype.itemsize]
    return rows.view(bits).bitwise_and(~sign).amax(dim=1).view(rows.dtype)


def _fused_group(linear: str) -> tuple[str, tuple[str, ...]]:
    """`model.layers.3.mlp.up_proj` -> `model.layers.3` and the linears that share its scales."""
    for group in FUSED_LINEARS:
        for name in group:
            if linear.endswith(f".{name}"):
                return linear.removesuffix(f".{name}"), group
    raise ValueError(f"no linear of a decoder layer: {linear}")


def _calibrated(calibration: CalibrationResult | None, name: str) -> float:
    if calibration is None or name not in calibration.amax:
        raise NvlmError(f"the calibration has no amax of {name}", hint="calibrate this checkpoint again")
    amax = calibration.amax[name]
    if not 0 < amax < float("inf"):
        raise NvlmError(f"the calibration's amax of {name} is {amax}", hint="calibrate this checkpoint again")
    return amax
