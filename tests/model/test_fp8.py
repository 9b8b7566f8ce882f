"""FP8 arithmetic against ml_dtypes' e4m3, an implementation of its own."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from nvlm_deploy.model.fp8 import scale_from_amax, to_e4m3
from nvlm_deploy.model.fp8_linear import Fp8Linear

ONE = torch.ones(())


def codes_of(values: torch.Tensor) -> list[int]:
    return to_e4m3(values, ONE).view(torch.uint8).flatten().tolist()


def test_codes_equal_ml_dtypes_over_the_whole_range_and_at_every_midpoint():
    grid = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    finite = np.sort(grid[np.isfinite(grid)])
    midpoints = (finite[1:] + finite[:-1]) / 2
    random = np.random.default_rng(0).normal(0, 100, 10_000).astype(np.float32).clip(-448, 448)
    values = np.concatenate([finite, midpoints, random])
    expected = values.astype(ml_dtypes.float8_e4m3fn).view(np.uint8).tolist()
    assert codes_of(torch.from_numpy(values)) == expected


@pytest.mark.parametrize("value", [449.0, 470.0, 1e30, float("inf")])
def test_values_beyond_the_largest_saturate_instead_of_becoming_nan(value):
    assert to_e4m3(torch.tensor([value, -value]), ONE).float().tolist() == [448.0, -448.0]


def test_the_scale_maps_the_largest_magnitude_to_the_largest_code():
    weights = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    scale = scale_from_amax(weights.abs().amax())
    assert to_e4m3(weights, scale).float().abs().max() == 448.0


def test_an_all_zero_tensor_has_a_usable_scale():
    scale = scale_from_amax(torch.zeros(()))
    assert scale > 0
    assert to_e4m3(torch.zeros(4), scale).float().tolist() == [0.0] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_linear_layer_multiplies_the_dequantised_operands(dtype):
    random = torch.Generator().manual_seed(1)
    x, weight, bias = (torch.randn(shape, generator=random) for shape in ((5, 32), (16, 32), (16,)))
    x = x.to(dtype)
    scales = scale_from_amax(weight.abs().amax()), scale_from_amax(x.abs().amax())
    layer = Fp8Linear(to_e4m3(weight, scales[0]), scales[0], scales[1], bias)
    rounded = [
        (tensor.float() / scale).numpy().astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * float(scale)
        for tensor, scale in ((x, scales[1]), (weight, scales[0]))
    ]
    expected = torch.from_numpy(rounded[0] @ rounded[1].T + bias.double().numpy())
    found = layer(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-4)
