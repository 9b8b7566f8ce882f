"""FP8 linear layers of noise, and what they must compute: on a CPU here, on a GPU in tests/gpu."""

from __future__ import annotations

import torch

from nvlm_deploy.model.fp8 import scale_from_amax, to_e4m3
from nvlm_deploy.model.fp8_linear import Fp8Linear


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def layer_of(shape: tuple[int, int], *, per_channel: bool, dynamic: bool, bias: bool = True) -> Fp8Linear:
    weight = noise(*shape)
    scale = scale_from_amax(weight.abs().amax(dim=1) if per_channel else weight.abs().amax())
    codes = to_e4m3(weight, scale[:, None] if per_channel else scale)
    return Fp8Linear(codes, scale, None if dynamic else torch.tensor(0.01), noise(shape[0]) if bias else None)


def expected(layer: Fp8Linear, x: torch.Tensor) -> torch.Tensor:
    """The dequantised operands multiplied in float64."""
    scale = layer.activation_scale
    if scale is None:
        scale = scale_from_amax(x.abs().amax(dim=-1, keepdim=True))
    rounded = to_e4m3(x, scale).double() * scale.double()
    weight = layer.weight.double() * layer.weight_scale.double().reshape(-1, 1)
    assert layer.bias is not None
    return rounded @ weight.T + layer.bias.double()
