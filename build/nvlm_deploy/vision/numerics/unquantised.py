"""A part of an FP8 graph without its FP8: what is left must be as exact as its base type.

FP8's own rounding is coarse enough to hide a lost bias or a wrong scale of the scores. With the codes taken out and the
checkpoint's weights put in, those show.
"""

from __future__ import annotations

import onnx_ir
from onnx_ir import DataType

from nvlm_deploy.vision.element_types import FLOAT8_TYPES

# what a quantised weight is called where it is an input
UNQUANTISED = " (unquantised)"


def without_fp8(part: onnx_ir.Model) -> None:
    """Take every QuantizeLinear and DequantizeLinear of FP8 out, in place; the quantised weights become inputs.

    These are called as the weight + UNQUANTISED and have the type that it was dequantised to.
    """
    for node in [node for node in part.graph if node.op_type == "DequantizeLinear"]:
        source = _before_codes(part.graph, node)
        if source is not None:
            onnx_ir.convenience.replace_all_uses_with(node.outputs[0], source, replace_graph_outputs=True)
            part.graph.remove(node, safe=True)


def _before_codes(graph: onnx_ir.Graph, dequantiser: onnx_ir.Node) -> onnx_ir.Value | None:
    codes, scale = dequantiser.inputs[:2]
    assert codes is not None and scale is not None  # DequantizeLinear has both
    quantiser = codes.producer()
    if quantiser is not None:
        return quantiser.inputs[0] if quantiser.op_type == "QuantizeLinear" else None
    if codes.dtype not in FLOAT8_TYPES:
        return None
    graph.initializers.pop(str(codes.name), None)
    weight = onnx_ir.Value(name=f"{codes.name}{UNQUANTISED}", type=onnx_ir.TensorType(scale.dtype or DataType.FLOAT))
    graph.inputs.append(weight)
    return weight
