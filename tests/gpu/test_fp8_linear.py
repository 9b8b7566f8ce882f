"""FP8 tensor cores against the dequantised operands multiplied in float64 on the CPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from nvlm_deploy.model.fp8 import to_e4m3

MODEL_TESTS = Path(__file__).parents[1] / "model"
if str(MODEL_TESTS) not in sys.path:
    sys.path.insert(0, str(MODEL_TESTS))

from fp8_layers import expected, layer_of  # noqa: E402

# (out, in): small, the released decoder's attention output, a slice of its MLP
SHAPES = [(48, 32), (8192, 8192), (3696, 8192)]
BF16_ROUNDING = 2**-8


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 256])
@pytest.mark.parametrize(
    ("per_channel", "dynamic"), [(False, False), (True, True)], ids=["per tensor", "per channel and token"]
)
def test_a_linear_multiplies_the_same_operands(
    device: str, shape: tuple[int, int], tokens: int, per_channel: bool, dynamic: bool
) -> None:
    layer = layer_of(shape, per_channel=per_channel, dynamic=dynamic)
    x = torch.randn(tokens, shape[1], generator=torch.Generator().manual_seed(2)).bfloat16()
    wanted = expected(layer, x)
    found = layer.to(device)(x.to(device)).cpu().double()
    error = float((found - wanted).abs().max() / wanted.abs().max())
    assert error < 2 * BF16_ROUNDING, error


def test_codes_made_on_the_gpu_are_those_made_on_the_cpu(device: str) -> None:
    values = torch.randn(1 << 16, generator=torch.Generator().manual_seed(3)) * 100
    values = torch.cat([values, torch.tensor([0.0, -0.0, 448.0, 464.0, 1e9, -1e9, 2**-9, 2**-10, 3 * 2**-10])])
    for scale in (torch.tensor(1.0), torch.tensor(0.37)):
        made = to_e4m3(values.to(device), scale.to(device)).cpu()
        assert torch.equal(made.view(torch.uint8), to_e4m3(values, scale).view(torch.uint8))
