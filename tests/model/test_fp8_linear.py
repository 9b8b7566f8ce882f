"""The linear layers of the reference decoder against torch's own in float64, and what they keep in memory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from nvlm_deploy.model.fp8 import scale_from_amax, to_e4m3, widened
from nvlm_deploy.model.fp8_linear import BLOCK_ELEMENTS, SMALL_ELEMENTS
from nvlm_deploy.model.linear import LARGE_ELEMENTS, InferenceLinear

if str(Path(__file__).parent) not in sys.path:
    sys.path.insert(0, str(Path(__file__).parent))

from fp8_layers import expected, layer_of, noise

# (out, in): kept wide as well; in one block; in several blocks, the last of them shorter
SIZES = {"small": (48, 32), "one block": (528, 512), "blocks": (1120, 1024)}


@pytest.fixture(params=SIZES.values(), ids=SIZES.keys())
def shape(request: pytest.FixtureRequest) -> tuple[int, int]:
    shape: tuple[int, int] = request.param
    return shape


KINDS = pytest.mark.parametrize(
    ("per_channel", "dynamic"),
    [(False, False), (True, True), (False, True)],
    ids=["per tensor", "per channel and token", "per tensor and token"],
)


def test_the_sizes_take_every_way() -> None:
    small, one, several = (rows * columns for rows, columns in SIZES.values())
    assert small <= SMALL_ELEMENTS < one < BLOCK_ELEMENTS < several


@KINDS
def test_it_multiplies_the_dequantised_operands(shape: tuple[int, int], per_channel: bool, dynamic: bool) -> None:
    layer = layer_of(shape, per_channel=per_channel, dynamic=dynamic)
    for x in (noise(1, 1, shape[1]), noise(2, 9, shape[1]), noise(600, shape[1]) * noise(600, 1)):
        found, wanted = layer(x), expected(layer, x)
        assert found.dtype == torch.float32
        assert (found.double() - wanted).norm() < 2e-6 * wanted.norm()


@KINDS
@pytest.mark.parametrize("name", ["one block", "blocks"])
def test_the_tensor_cores_call_computes_the_same(name: str, per_channel: bool, dynamic: bool) -> None:
    """torch._scaled_mm exists for CPUs too, so that its operands' layouts are tried; the result is rounded to BF16."""
    layer = layer_of(SIZES[name], per_channel=per_channel, dynamic=dynamic)
    x = noise(2, 3, SIZES[name][1])
    scale = layer.activation_scale if layer.activation_scale is not None else scale_from_amax(x.abs().amax(-1, True))
    found, wanted = layer._on_tensor_cores(to_e4m3(x, scale), scale, torch.float32), layer(x)
    assert found.shape == wanted.shape
    assert (found - wanted).norm() < 5e-3 * wanted.norm()


def test_a_large_weight_takes_a_byte_for_each_element() -> None:
    layer = layer_of(SIZES["blocks"], per_channel=False, dynamic=False, bias=False)
    layer(noise(4, SIZES["blocks"][1]))
    rows, columns = SIZES["blocks"]
    assert sum(buffer.nbytes for buffer in layer.buffers()) == rows * columns + 2 * 4
    assert layer._small is None


def test_new_weights_replace_what_was_widened() -> None:
    layer, other = (layer_of(SIZES["small"], per_channel=False, dynamic=False) for _ in range(2))
    x = noise(3, SIZES["small"][1])
    before = layer(x)
    other.weight = (-layer.weight.float()).to(torch.float8_e4m3fn)
    layer.load_state_dict(other.state_dict(), assign=True)
    assert layer.bias is not None
    torch.testing.assert_close(layer(x) - layer.bias, layer.bias - before)


@pytest.mark.parametrize("elements", [256, 4096], ids=["torch's cast", "ours"])
def test_widening_is_torchs_cast_for_every_code(elements: int) -> None:
    codes = torch.arange(elements).to(torch.uint8).view(torch.float8_e4m3fn)
    torch.testing.assert_close(widened(codes), codes.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(64, 32), (1030, 512)], ids=["small", "large"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_an_unquantised_linear_is_torchs(shape: tuple[int, int], dtype: torch.dtype, bias: bool) -> None:
    assert (shape[0] * shape[1] >= LARGE_ELEMENTS) == (shape[0] > 64)
    layer = InferenceLinear(shape[1], shape[0], bias=bias).requires_grad_(False).to(dtype)
    plain = torch.nn.Linear(shape[1], shape[0], bias=bias).requires_grad_(False).double()
    plain.load_state_dict(layer.state_dict())
    for x in (noise(1, 1, shape[1]), noise(3, 7, shape[1]).transpose(0, 1), noise(shape[1])):
        found, wanted = layer(x.to(dtype)), plain(x.to(dtype).double())
        assert found.shape == wanted.shape
        assert found.dtype == dtype
        assert (found.double() - wanted).norm() < (1e-6 if dtype is torch.float32 else 1e-2) * wanted.norm()
