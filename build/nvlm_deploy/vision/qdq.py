"""FP8 in the graph of one block: QuantizeLinear and DequantizeLinear around what its matrix products read.

A strongly typed builder takes precision from these nodes alone. The scales have the type of the side that is not
quantised; a linear's weight is stored as codes with a DequantizeLinear before its Transpose, and no QuantizeLinear, as
ModelOpt's exporter writes it (modelopt/onnx/export/fp8_exporter.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy.typing as npt
    import onnx_ir

# linear of a block -> the point that goes into it
LINEAR_INPUTS: Mapping[str, str] = {
    "attn.qkv": "norm1",
    "attn.proj": "attention",
    "mlp.fc1": "norm2",
    "mlp.fc2": "gelu",
}
ZERO_POINT = "fp8_zero_point"
SOFTMAX_SCALE = "attn.softmax_scale"


@dataclass(frozen=True)
class Fp8Choice:
    """How the blocks are quantised.

    `weight_scales`: one of a linear, or one of each of its output rows. `attention`: also what its two products read.
    """

    weight_scales: Literal["per_tensor", "per_channel"] = "per_channel"
    attention: bool = False


def quantise_block(model: onnx_ir.Model, choice: Fp8Choice) -> None:
    """Rewrite the traced graph of a block (vision/trace.py) in place.

    For a linear `attn.qkv` its weight becomes e4m3, `attn.qkv.input_scale` [] and `attn.qkv.weight_scale` ([] or
    [out]) are new initialisers without values; with attention `attn.q_scale`, `attn.k_scale` and `attn.v_scale` [] too.
    """
    block = _Block(model)
    for linear in LINEAR_INPUTS:
        block.quantise_linear(linear, per_channel=choice.weight_scales == "per_channel")
    if choice.attention:
        block.quantise_attention()


class _Block:
    """The graph under rewriting, its base type, and the zero point that every QuantizeLinear shares.

    The zero point is 0; it is there because only its type says that the codes are e4m3 (opset 20).
    """

    def __init__(self, model: onnx_ir.Model) -> None:
        import ml_dtypes
        import numpy as np

        self.graph = model.graph
        base = model.graph.inputs[0].dtype
        assert base is not None  # the traced input has a type
        self.base = base
        self.zero = self._constant(ZERO_POINT, np.zeros((), ml_dtypes.float8_e4m3fn))

    def quantise_linear(self, linear: str, *, per_channel: bool) -> None:
        """`x -> MatMul <- Transpose <- weight` with both sides through e4m3."""
        import onnx_ir

        weight = self.graph.initializers[f"{linear}.weight"]
        (transpose,) = weight.consumers()
        (product,) = transpose.outputs[0].consumers()
        self._through_codes(product, 0, f"{linear}.input")
        weight.dtype = onnx_ir.DataType.FLOAT8E4M3FN
        assert isinstance(weight.shape, onnx_ir.Shape)  # an initialiser has one
        scale = self._scale(f"{linear}.weight_scale", weight.shape[:1] if per_channel else ())
        attributes = {"axis": 0} if per_channel else {}
        dequantised = self._node("DequantizeLinear", [weight, scale], f"{linear}.weight_dequantised", attributes)
        dequantised.type, dequantised.shape = onnx_ir.TensorType(self.base), weight.shape
        self._insert(dequantised, transpose, 0)

    def quantise_attention(self) -> None:
        """What goes into q k^T and into the product of its softmax with v; in the base type, before any cast."""
        (softmax,) = (node for node in self.graph if node.op_type == "Softmax")
        scores, weighted_values = _product_before(softmax), _product_behind(softmax)
        self._through_codes(*_before_cast(scores, 0), "attn.q")
        self._through_codes(*_before_cast(scores, 1), "attn.k")
        self._through_codes(*_before_cast(weighted_values, 1), "attn.v")
        self._through_codes(*_before_cast(weighted_values, 0), "attn.softmax", self._softmax_scale())

    def _softmax_scale(self) -> onnx_ir.Value:
        """1/448, ModelOpt's for every softmax: its values are below 1, whatever the pictures. Nearest bf16."""
        import ml_dtypes
        import numpy as np

        return self._constant(SOFTMAX_SCALE, np.array(1 / 448, ml_dtypes.bfloat16).astype(self.base.numpy()))

    def _through_codes(self, consumer: onnx_ir.Node, index: int, name: str, scale: onnx_ir.Value | None = None) -> None:
        """Let an input of `consumer` go through e4m3 codes on its way."""
        import onnx_ir

        source = consumer.inputs[index]
        assert source is not None  # the products and casts have all their inputs
        scale = self._scale(f"{name}_scale", ()) if scale is None else scale
        codes = self._node("QuantizeLinear", [source, scale, self.zero], f"{name}_codes", {})
        dequantised = self._node("DequantizeLinear", [codes, scale, self.zero], f"{name}_dequantised", {})
        codes.type, codes.shape = onnx_ir.TensorType(onnx_ir.DataType.FLOAT8E4M3FN), source.shape
        dequantised.type, dequantised.shape = onnx_ir.TensorType(self.base), source.shape
        self._insert(dequantised, consumer, index)

    def _insert(self, value: onnx_ir.Value, consumer: onnx_ir.Node, index: int) -> None:
        """Put the new nodes that lead to `value` before its consumer and join them."""
        new: list[onnx_ir.Node] = []
        node = value.producer()
        while node is not None and node.graph is None:
            new.insert(0, node)
            node = node.inputs[0].producer() if node.inputs[0] is not None else None
        self.graph.insert_before(consumer, new)
        consumer.replace_input_with(index, value)

    def _node(self, operator: str, inputs: list[onnx_ir.Value], name: str, attributes: dict[str, int]) -> onnx_ir.Value:
        import onnx_ir

        node = onnx_ir.node(operator, inputs, attributes=attributes, name=f"node_{name}")
        node.outputs[0].name = name
        return node.outputs[0]

    def _scale(self, name: str, shape: tuple[int | onnx_ir.SymbolicDim, ...]) -> onnx_ir.Value:
        """An initialiser whose value comes with the weights."""
        import onnx_ir

        value = onnx_ir.Value(name=name, shape=onnx_ir.Shape(shape), type=onnx_ir.TensorType(self.base))
        self.graph.initializers.add(value)
        return value

    def _constant(self, name: str, array: npt.NDArray[Any]) -> onnx_ir.Value:
        import onnx_ir

        tensor = onnx_ir.tensor(array, name=name)
        kind = onnx_ir.TensorType(tensor.dtype)
        value = onnx_ir.Value(name=name, shape=onnx_ir.Shape(array.shape), type=kind, const_value=tensor)
        self.graph.initializers.add(value)
        return value


def _product_before(softmax: onnx_ir.Node) -> onnx_ir.Node:
    node: onnx_ir.Node | None = softmax
    while node is not None and node.op_type != "MatMul":
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    assert node is not None  # the tracer's attention has one (vision/trace.py)
    return node


def _product_behind(softmax: onnx_ir.Node) -> onnx_ir.Node:
    node = softmax
    while node.op_type != "MatMul":
        (node,) = node.outputs[0].consumers()
    return node


def _before_cast(product: onnx_ir.Node, index: int) -> tuple[onnx_ir.Node, int]:
    """Where a value in the base type goes in: the cast to float32 before a product, or the product itself."""
    source = product.inputs[index]
    producer = None if source is None else source.producer()
    is_widening = producer is not None and producer.op_type == "Cast" and producer.attributes["to"].as_int() == 1
    return (producer, 0) if producer is not None and is_widening else (product, index)
