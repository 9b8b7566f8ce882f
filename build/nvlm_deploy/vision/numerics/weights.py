"""The weights in a vision graph's file beside the checkpoint's: exact, and without a tile.

Numbers of a few tiles forgive a wrong row, and FP8's bounds a scale that is a tenth too small. The file does not: what
is not quantised must be the checkpoint's value cast to its type, bit for bit; a code times its scale must be within
half a step of the code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir
import torch
from onnx_ir import DataType

from nvlm_deploy.model.fp8 import E4M3_MAX
from nvlm_deploy.vision.element_types import FLOAT8_TYPES, short_name
from nvlm_deploy.vision.graph_file import CALIBRATION_NAME
from nvlm_deploy.vision.numerics.subgraph import VisionGraph

# of float32, in codes times scale and in what is compared with them
SLACK = 2.0**-20
_CHUNK_VALUES = 1 << 22
# torch's type of the same bits
_STORED = {
    DataType.FLOAT: torch.float32,
    DataType.BFLOAT16: torch.bfloat16,
    DataType.FLOAT16: torch.float16,
    DataType.FLOAT8E4M3FN: torch.float8_e4m3fn,
}
_INTEGERS = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def weight_problem(graph: VisionGraph, name: str, expected: torch.Tensor) -> str | None:
    """What is wrong with an initialiser, in words; None when it holds the checkpoint's `expected`, float32.

    The weight is read some rows at a time.
    """
    value = graph.model.graph.initializers.get(name)
    if value is None or value.const_value is None:
        return f"the graph has no initialiser {name}, so that what it computes with cannot be compared"
    shape = [int(axis) for axis in value.const_value.shape.numpy()]
    if shape != list(expected.shape):
        return f"{name} is {shape} in the file, {list(expected.shape)} in the checkpoint"
    if value.dtype in FLOAT8_TYPES:
        return _problem_of_codes(value, expected)
    if value.dtype not in _STORED:
        return f"{name} is {short_name(value.dtype)} in the file"
    return _problem_of_values(value, expected)


def scale_problems(graph: VisionGraph, amax: Mapping[str, float]) -> Iterator[tuple[onnx_ir.Value, str]]:
    """Scales of activations that do not fit the calibration: the codes' value, and what is wrong.

    448 times the scale is the amax of the named value that is quantised, or up to one bf16 number above it.
    """
    for node in graph.model.graph:
        largest = amax.get(str(node.inputs[0].name)) if node.op_type == "QuantizeLinear" and node.inputs[0] else None
        found = None if largest is None else _scale_of(node)
        if largest is None or found is None:
            continue
        scale, name = found
        held = float(scale.max()) * E4M3_MAX
        if scale.numel() != 1 or not largest * (1 - SLACK) <= held <= largest * (1 + 2.0**-7):
            what = f"{name} holds up to {held:.4g}, {CALIBRATION_NAME} beside the graph says {largest:.4g}"
            yield node.outputs[0], what


def _problem_of_values(value: onnx_ir.Value, expected: torch.Tensor) -> str | None:
    differing, largest = 0, 0.0
    for rows, stored in _stored_rows(value):
        wanted = expected[rows].to(stored.dtype)
        # by bits: a NaN is no other NaN, and a checkpoint's -0.0 stays one
        differing += int((_bits(stored) != _bits(wanted)).sum())
        if differing:
            largest = max(largest, float((stored.float() - wanted.float()).abs().max()))
    if not differing:
        return None
    share = differing / max(1, expected.numel())
    return f"{share:.2g} of {value.name} in the file differs from the checkpoint, by up to {largest:.2g}"


def _problem_of_codes(value: onnx_ir.Value, expected: torch.Tensor) -> str | None:
    dequantisers = [use.node for use in value.uses() if use.node.op_type == "DequantizeLinear"]
    if len(dequantisers) != 1 or len(value.uses()) != 1 or value.dtype != DataType.FLOAT8E4M3FN:
        return f"{value.name} holds {short_name(value.dtype)} codes that no single DequantizeLinear reads"
    found = _scale_of(dequantisers[0])
    if found is None:
        return f"the scale of {value.name} is no constant of the graph"
    scale, name = found
    compared = _Compared()
    for rows, codes in _stored_rows(value):
        compared.add(codes, _of_rows(scale, dequantisers[0], rows, codes.ndim), expected[rows])
    if not compared.differing:
        return None
    share = compared.differing / max(1, expected.numel())
    return (
        f"{share:.2g} of {value.name} is more than half an FP8 step from the checkpoint; codes times {name} are "
        f"{compared.ratio:.3f} of its values"
    )


@dataclass
class _Compared:
    """Codes beside the values that they stand for, some rows after others."""

    differing: int = 0
    product: float = 0.0
    square: float = 0.0

    def add(self, codes: torch.Tensor, scale: torch.Tensor, expected: torch.Tensor) -> None:
        index = codes.view(torch.uint8).int()
        values, half_steps = (table[index] for table in _tables())
        found = values * scale
        allowed = half_steps * scale.abs() + SLACK * expected.abs()
        self.differing += int((~((found - expected).abs() <= allowed)).sum())
        self.product += float((found.nan_to_num() * expected).sum(dtype=torch.float64))
        self.square += float(expected.square().sum(dtype=torch.float64))

    @property
    def ratio(self) -> float:
        """By the least squares."""
        return self.product / self.square if self.square else 0.0


def _tables() -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [256] each: the value of an e4m3 code, and half the distance to its larger neighbour."""
    codes = torch.arange(256, dtype=torch.int32)
    exponents = (codes >> 3 & 15).clamp(min=1) - 7
    return codes.to(torch.uint8).view(torch.float8_e4m3fn).float(), torch.exp2(exponents.float() - 4)


def _scale_of(node: onnx_ir.Node) -> tuple[torch.Tensor, str] | None:
    """float32 [] or [rows] and its name; a lowered graph has it behind a cast."""
    value = node.inputs[1]
    while value is not None and not value.is_initializer():
        producer = value.producer()
        value = producer.inputs[0] if producer is not None and producer.op_type == "Cast" else None
    if value is None or value.dtype not in _STORED:
        return None
    return torch.cat([stored.float().reshape(-1) for _, stored in _stored_rows(value)]), str(value.name)


def _of_rows(scale: torch.Tensor, dequantiser: onnx_ir.Node, rows: slice, ndim: int) -> torch.Tensor:
    """As it multiplies these rows of codes."""
    if scale.numel() == 1:
        return scale.reshape(())
    axis = dequantiser.attributes.get_int("axis", 1) % ndim
    along = scale[rows] if axis == 0 else scale
    return along.reshape([-1 if number == axis else 1 for number in range(ndim)])


def _stored_rows(value: onnx_ir.Value) -> Iterator[tuple[slice, torch.Tensor]]:
    """What the file holds, in its own type."""
    tensor = value.const_value
    assert tensor is not None and value.dtype is not None  # the caller has looked
    stored, bits = _STORED[value.dtype], _bits_of_file(tensor, value.dtype)
    step = max(1, _CHUNK_VALUES // max(1, bits[:1].size)) if bits.ndim else 1
    for start in range(0, len(bits) if bits.ndim else 1, step):
        part = bits[start : start + step] if bits.ndim else bits
        yield slice(start, start + step) if bits.ndim else slice(None), torch.from_numpy(part.copy()).view(stored)


def _bits_of_file(tensor: onnx_ir.TensorProtocol, element_type: DataType) -> npt.NDArray[Any]:
    """Its bits as unsigned integers, mapped and not read."""
    shape = tuple(int(axis) for axis in tensor.shape.numpy())
    integer = _INTEGERS[int(element_type.itemsize)]
    if isinstance(tensor, onnx_ir.ExternalTensor):
        if not shape or 0 in shape:
            return np.fromfile(tensor.path, integer, int(np.prod(shape)), offset=tensor.offset or 0).reshape(shape)
        return np.memmap(tensor.path, integer, "r", tensor.offset or 0, shape)
    return np.frombuffer(tensor.tobytes(), integer).reshape(shape)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize])
