"""A 16-bit or FP8 graph as one that ONNX Runtime's CPU provider runs, result for result the same.

The CPU provider has no BF16 kernels and few FP16 ones. In the lowered graph arithmetic is float32, and every result
that the graph types as BF16 or FP16 is rounded to that type by a cast there and back (round to nearest even). FP8
codes are the graph's own, with float32 copies of the scales. Weights stay in the file as they are and are cast when
the graph is loaded. Points keep their names, and no name is given twice: a lowered graph can be judged as any other.
Tried with ONNX Runtime 1.32: its optimiser keeps the casts at every level (tests/vision).
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir
from onnx_ir import DataType

from nvlm_deploy.vision.element_types import HALF_TYPES, ElementTypes, element_types

if TYPE_CHECKING:
    from collections.abc import Mapping

# they move values or choose among them: nothing to round
EXACT_OPERATORS = frozenset(
    [
        "Concat",
        "Expand",
        "Flatten",
        "Gather",
        "Identity",
        "Max",
        "Min",
        "Neg",
        "Abs",
        "Pad",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
        "Where",
    ]
)
# what says its own element type, in an attribute
TYPED_OPERATORS = ("Cast", "Constant", "ConstantOfShape")


def lowered(model: onnx_ir.Model) -> onnx_ir.Model:
    """The same computation without 16-bit arithmetic; a graph that has none is returned as it is.

    Inputs and outputs of 16-bit types become float32: outputs hold rounded values, inputs are expected to.
    """
    types = element_types(model.graph)
    if not any(element_type in HALF_TYPES for element_type in types.values()):
        return model
    result = _Lowering(types).graph(model.graph)
    return onnx_ir.Model(
        result,
        ir_version=model.ir_version,
        producer_name=model.producer_name,
        metadata_props=dict(model.metadata_props),
    )


def write_lowered(onnx: Path, folder: Path) -> Path:
    """Write the lowered graph of `onnx` and copies of its data files into `folder`; the path of the graph."""
    model = lowered(onnx_ir.load(onnx))
    folder.mkdir(parents=True, exist_ok=True)
    for location in _data_files(model):
        shutil.copyfile(onnx.parent / location, folder / location)
    onnx_ir.save(model, folder / onnx.name)
    return folder / onnx.name


def _data_files(model: onnx_ir.Model) -> set[str]:
    tensors = (value.const_value for value in model.graph.initializers.values())
    return {str(tensor.location) for tensor in tensors if isinstance(tensor, onnx_ir.ExternalTensor)}


class _Lowering:
    """One graph rewritten: for every old value, the float32 (or untouched) value that stands for it."""

    def __init__(self, types: ElementTypes) -> None:
        self.types = types
        self.names = {str(value.name) for value in types}
        self.node_names: set[str] = set()
        self.nodes: list[onnx_ir.Node] = []
        self.values: dict[onnx_ir.Value | None, onnx_ir.Value | None] = {None: None}

    def graph(self, old: onnx_ir.Graph) -> onnx_ir.Graph:
        self.node_names = {str(node.name) for node in old}
        inputs = [self._border(value) for value in old.inputs]
        initialisers = [self._initialiser(value) for value in old.initializers.values()]
        for node in old:
            self._node(node)
        outputs = [self._output(value) for value in old.outputs]
        return onnx_ir.Graph(
            inputs,
            outputs,
            nodes=self.nodes,
            initializers=initialisers,
            opset_imports=dict(old.opset_imports),
            name=old.name,
        )

    def _border(self, old: onnx_ir.Value) -> onnx_ir.Value:
        value = onnx_ir.Value(name=old.name, shape=old.shape, type=self._border_type(old))
        self.values[old] = value
        return value

    def _output(self, old: onnx_ir.Value) -> onnx_ir.Value:
        value = self.values[old]
        assert value is not None  # every output is computed
        value.shape, value.type = old.shape, self._border_type(old)
        return value

    def _border_type(self, value: onnx_ir.Value) -> onnx_ir.TensorType:
        element_type = self.types[value] or DataType.FLOAT
        return onnx_ir.TensorType(DataType.FLOAT if element_type in HALF_TYPES else element_type)

    def _initialiser(self, old: onnx_ir.Value) -> onnx_ir.Value:
        value = onnx_ir.Value(name=old.name, shape=old.shape, type=old.type, const_value=old.const_value)
        is_half = self._is_half(old)
        self.values[old] = self._cast(value, DataType.FLOAT, self._fresh(f"{old.name}/float32")) if is_half else value
        return value

    def _fresh(self, name: str) -> str:
        """For a new value; a graph that was lowered before has the usual names already."""
        return _unique(name, self.names)

    def _node(self, old: onnx_ir.Node) -> None:
        inputs = [self.values[value] for value in old.inputs]
        outputs = [onnx_ir.Value(name=self._raw_name(old, value)) for value in old.outputs]
        if old.op_type == "CastLike":
            self._add("Cast", inputs[:1], {"to": self.types[old.outputs[0]]}, outputs)
        else:
            self._add(old.op_type, inputs, old.attributes, outputs, domain=old.domain, name=old.name)
        for value, output in zip(old.outputs, outputs, strict=True):
            self.values[value] = self._finished(old, value, output)

    def _raw_name(self, node: onnx_ir.Node, value: onnx_ir.Value) -> str | None:
        """Names of values stay with what is rounded."""
        untouched = not self._is_half(value) or node.op_type in EXACT_OPERATORS
        return value.name if untouched else self._fresh(f"{value.name}/before rounding")

    def _finished(self, node: onnx_ir.Node, old: onnx_ir.Value, output: onnx_ir.Value) -> onnx_ir.Value:
        if not self._is_half(old) or node.op_type in EXACT_OPERATORS:
            return output
        if node.op_type not in (*TYPED_OPERATORS, "CastLike"):  # those give the 16-bit type by themselves
            output = self._cast(output, self.types[old], self._fresh(f"{old.name}/rounded"))
        return self._cast(output, DataType.FLOAT, old.name)

    def _is_half(self, old: onnx_ir.Value) -> bool:
        return self.types[old] in HALF_TYPES

    def _cast(self, value: onnx_ir.Value, element_type: DataType | None, name: str | None) -> onnx_ir.Value:
        result = onnx_ir.Value(name=name)
        self._add("Cast", [value], {"to": element_type}, [result])
        return result

    def _add(
        self,
        op_type: str,
        inputs: Iterable[onnx_ir.Value | None],
        attributes: Mapping[str, Any],
        outputs: list[onnx_ir.Value],
        **more: Any,
    ) -> None:
        converted = [
            value if isinstance(value, onnx_ir.Attr) else onnx_ir.AttrInt64(key, int(value))
            for key, value in attributes.items()
        ]
        domain = more.pop("domain", "")
        # a node without a name gets one when it is written, which another may have
        more["name"] = more.get("name") or _unique(f"{op_type} to {outputs[0].name}", self.node_names)
        self.nodes.append(onnx_ir.Node(domain, op_type, list(inputs), converted, outputs=outputs, **more))


def _unique(name: str, taken: set[str]) -> str:
    """The name, with a number behind it where it is taken; from now on it is."""
    numbered = (f"{name} {number}" for number in itertools.count(2))
    found = next(each for each in itertools.chain([name], numbered) if each not in taken)
    taken.add(found)
    return found
