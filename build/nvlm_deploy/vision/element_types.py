"""What every value of a graph is computed in, worked out from the operators.

An edited graph may lack type annotations or carry stale ones, so those are read only where no operator tells.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnx_ir import DataType

if TYPE_CHECKING:
    import onnx_ir

HALF_TYPES = (DataType.BFLOAT16, DataType.FLOAT16)
FLOAT_TYPES = (*HALF_TYPES, DataType.FLOAT, DataType.DOUBLE)
FLOAT8_TYPES = (DataType.FLOAT8E4M3FN, DataType.FLOAT8E5M2)

_SHORT_NAMES = {
    DataType.FLOAT: "fp32",
    DataType.BFLOAT16: "bf16",
    DataType.FLOAT16: "fp16",
    DataType.FLOAT8E4M3FN: "fp8",
    DataType.FLOAT8E5M2: "fp8 (e5m2)",
    DataType.DOUBLE: "fp64",
}
_INTEGERS = ("Shape", "Size", "ArgMax", "ArgMin", "NonZero")
_BOOLEANS = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "And", "Or", "Not", "IsNaN", "IsInf")
# the input whose element type the output has, where it is not the first
_TYPE_GIVING_INPUT = {"CastLike": 1, "DequantizeLinear": 1, "QuantizeLinear": 2, "Where": 1}

ElementTypes = dict["onnx_ir.Value", DataType | None]


def short_name(element_type: DataType | None) -> str:
    """As the field says it: `fp16`."""
    if element_type is None:
        return "an unknown type"
    return _SHORT_NAMES.get(element_type, element_type.name.lower())


def element_types(graph: onnx_ir.Graph) -> ElementTypes:
    """The element type of every value in the graph; None where nothing tells it."""
    found: ElementTypes = {value: value.dtype for value in (*graph.inputs, *graph.initializers.values())}
    for node in graph:
        for output in node.outputs:
            found[output] = _result_type(node, found) or output.dtype
    return found


def _result_type(node: onnx_ir.Node, found: ElementTypes) -> DataType | None:
    if node.op_type == "Cast":
        return DataType(node.attributes["to"].as_int())
    if node.op_type in _INTEGERS:
        return DataType.INT64
    if node.op_type in _BOOLEANS:
        return DataType.BOOL
    if node.op_type in ("Constant", "ConstantOfShape"):
        return _constant_type(node)
    index = _TYPE_GIVING_INPUT.get(node.op_type, 0)
    giving = node.inputs[index] if index < len(node.inputs) else None
    return None if giving is None else found.get(giving)


def _constant_type(node: onnx_ir.Node) -> DataType:
    if "value" in node.attributes:
        return node.attributes["value"].as_tensor().dtype
    if "value_int" in node.attributes or "value_ints" in node.attributes:
        return DataType.INT64
    return DataType.FLOAT
