"""Which scales a decoder layer gets and what its weights become in FP8 (e4m3, one scale per fused group of linears)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from nvlm_deploy.checkpoint.trtllm_layout import ACTIVATION_SCALE, WEIGHTS_SCALE, LayoutTensor
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.llm.calibrate import FUSED_LINEARS, CalibrationResult, weight_amax
from nvlm_deploy.model.fp8 import scale_from_amax, to_e4m3


@dataclass(frozen=True)
class LinearScales:
    """Dequantisation multipliers, float32 [1]."""

    weight: torch.Tensor
    activation: torch.Tensor


def quantised_layer(
    tensors: list[LayoutTensor], weights: Mapping[str, torch.Tensor], calibration: CalibrationResult
) -> dict[str, torch.Tensor]:
    """The FP8 linears of one layer, by name in the checkpoint: codes and both scales.

    `weights` holds Hugging Face's tensors of the layer. Raises NvlmError when the calibration lacks the layer or was
    made with other weights, and for weights that are all zero or not finite.
    """
    quantised: dict[str, torch.Tensor] = {}
    for tensor in tensors:
        if tensor.dtype != "F8_E4M3":
            continue
        module = tensor.name.removesuffix(".weight")
        scales = linear_scales(tensor.sources[0].removesuffix(".weight"), weights, calibration)
        quantised[tensor.name] = to_e4m3(torch.cat([weights[source] for source in tensor.sources]), scales.weight)
        quantised[f"{module}.{WEIGHTS_SCALE}"] = scales.weight
        quantised[f"{module}.{ACTIVATION_SCALE}"] = scales.activation
    return quantised


def linear_scales(linear: str, weights: Mapping[str, torch.Tensor], calibration: CalibrationResult) -> LinearScales:
    """Scales of a linear `model.layers.N.<linear>`, shared by its fused group.

    Were they not shared, TensorRT-LLM would requantise the fused weight with the larger one and lose precision
    (contract A.6).
    """
    layer, group = _fused_group(linear)
    amax = max(_weight_amax(f"{layer}.{name}.weight", weights, calibration) for name in group)
    activation = _calibrated(calibration, f"{layer}.{group[0]}.input")
    return LinearScales(scale_from_amax(torch.tensor([amax])), scale_from_amax(torch.tensor([activation])))


def _fused_group(linear: str) -> tuple[str, tuple[str, ...]]:
    """`model.layers.3.mlp.up_proj` -> `model.layers.3` and the linears that share its scales."""
    for group in FUSED_LINEARS:
        for name in group:
            if linear.endswith(f".{name}"):
                return linear.removesuffix(f".{name}"), group
    raise ValueError(f"no linear of a decoder layer: {linear}")


def _weight_amax(name: str, weights: Mapping[str, torch.Tensor], calibration: CalibrationResult) -> float:
    amax, calibrated = weight_amax(name, weights[name]), _calibrated(calibration, name)
    if amax != calibrated:
        raise NvlmError(
            f"{name} has amax {amax:.6g}, {calibrated:.6g} when calibrated: the calibration is of another checkpoint",
            hint="calibrate this checkpoint again",
        )
    return amax


def _calibrated(calibration: CalibrationResult, name: str) -> float:
    if name not in calibration.amax:
        raise NvlmError(f"the calibration has no amax of {name}", hint="calibrate this checkpoint again")
    amax = calibration.amax[name]
    if not 0 < amax < float("inf"):
        raise NvlmError(f"the calibration's amax of {name} is {amax}", hint="calibrate this checkpoint again")
    return amax
