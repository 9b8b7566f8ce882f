"""FP8 (e4m3) arithmetic: scales, casts, and a linear layer that computes with the quantised operands.

A scale is the *de*quantisation multiplier amax / 448, as TensorRT-LLM's `weights_scaling_factor` and
`activation_scaling_factor` are (contract A.5).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

E4M3_MAX = 448.0


def scale_from_amax(amax: torch.Tensor) -> torch.Tensor:
    """float32 dequantisation multiplier; an all-zero tensor gets scale 1, as in ModelOpt, not a division by zero."""
    wide = amax.float()
    return torch.where(wide > 0, wide, torch.full_like(wide, E4M3_MAX)) / E4M3_MAX


def to_e4m3(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Nearest e4m3 codes of x / scale.

    e4m3 has no infinity: clamped before the cast, or 470.0 would become NaN.
    """
    return (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


class Fp8Linear(nn.Module):
    """Static per-tensor FP8: x and weight as e4m3 codes, the product in float32, both scales applied after it.

    `weight` holds the codes widened to float32 (CPUs have no FP8 multiplier; every e4m3 value is exact in float32).
    """

    def __init__(
        self,
        codes: torch.Tensor,
        weight_scale: torch.Tensor,
        activation_scale: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> None:
        """codes float8_e4m3fn [out, in]; scales float32, one element; bias [out]."""
        super().__init__()
        self.register_buffer("weight", codes.float())
        self.register_buffer("product_scale", (weight_scale.float() * activation_scale.float()).reshape(()))
        self.register_buffer("activation_scale", activation_scale.float().reshape(()))
        self.register_buffer("bias", bias)
        self.weight: torch.Tensor
        self.product_scale: torch.Tensor
        self.activation_scale: torch.Tensor
        self.bias: torch.Tensor | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] in any float type -> [..., out] in the same."""
        quantised = to_e4m3(x, self.activation_scale).float()
        product = functional.linear(quantised, self.weight) * self.product_scale
        return (product if self.bias is None else product + self.bias.float()).to(x.dtype)
