"""A part of a vision graph, cut out between named values; weights stay where they are in the data file."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir
from onnx_ir import DataType

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.vision.element_types import HALF_TYPES, ElementTypes, element_types
from nvlm_deploy.vision.engine import run_graph
from nvlm_deploy.vision.graph_file import graph_from_file
from nvlm_deploy.vision.lowering import lowered

# a value that is read from outside and computed as well: the computed one's name ends so
COMPUTED = " (computed)"


class VisionGraph:
    """A vision.onnx as it lies on disk: its nodes, element types and named values. No weight is read."""

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        """`path` may be the folder of a `vision.onnx`; `threads=None` uses every core.

        Raises NvlmError when there is no such graph, it cannot be read, or its data file is missing or cut short.
        """
        self.path, self.model = graph_from_file(path)
        self.threads = threads
        self.types: ElementTypes = element_types(self.model.graph)
        self.values = {str(value.name): value for value in self.types}

    @property
    def precision(self) -> str:
        """`fp8` when a weight is, else the 16-bit type of the weights, else `fp32`."""
        if any(self.types[value] == DataType.FLOAT8E4M3FN for value in self.model.graph.initializers.values()):
            return "fp8"
        return {DataType.BFLOAT16: "bf16", DataType.FLOAT16: "fp16"}.get(self.base_type, "fp32")

    @cached_property
    def base_type(self) -> DataType:
        """Of the weights that are not FP8: the float type with the most bytes."""
        sizes = dict.fromkeys((DataType.FLOAT, *HALF_TYPES), 0)
        for value in self.model.graph.initializers.values():
            element_type = self.types[value]
            if element_type in sizes and value.const_value is not None:
                sizes[element_type] += value.const_value.nbytes
        return max(sizes, key=lambda element_type: sizes[element_type])

    def element_type(self, name: str) -> DataType | None:
        return self.types[self.values[name]]

    def subgraph(self, outputs: Sequence[str], feeds: Collection[str]) -> onnx_ir.Model:
        """The nodes that compute `outputs`, walking back to the nearest values of `feeds` and no further.

        A feed that is an output too is read by whoever needs it, and computed under its name + COMPUTED: with feeds
        between them, operations stand each by itself. The graph's inputs are the feeds that were reached. Raises
        NvlmError when the walk meets an input of the whole graph that is no feed.
        """
        return _Cut(self, feeds).model(outputs)

    def run(
        self, part: onnx_ir.Model, inputs: Mapping[str, npt.NDArray[Any]], outputs: Sequence[str]
    ) -> list[npt.NDArray[np.float32]]:
        """Run a subgraph, lowered; only its weights are read. Raises NvlmError when it cannot be run."""
        serialised = onnx_ir.to_proto(lowered(part)).SerializeToString()
        return run_graph(serialised, inputs, outputs, data_folder=self.path.parent.resolve(), threads=self.threads)


def computed_name(name: str, feeds: Collection[str]) -> str:
    """What VisionGraph.subgraph calls an output."""
    return f"{name}{COMPUTED}" if name in feeds else name


class _Cut:
    """One walk: old values to new ones, nodes in the order of the whole graph."""

    def __init__(self, graph: VisionGraph, feeds: Collection[str]) -> None:
        self.graph, self.feeds = graph, feeds
        self.inputs: dict[str, onnx_ir.Value] = {}
        self.initialisers: dict[str, onnx_ir.Value] = {}
        self.computed: dict[onnx_ir.Value, onnx_ir.Value] = {}

    def model(self, outputs: Sequence[str]) -> onnx_ir.Model:
        whole = self.graph.model
        wanted = [self.graph.values[name] for name in outputs]
        needed = nodes_behind(wanted, self.feeds)
        nodes = [self._copy(node) for node in whole.graph if node in needed]
        part = onnx_ir.Graph(
            list(self.inputs.values()),
            [self._output(value) for value in wanted],
            nodes=nodes,
            initializers=list(self.initialisers.values()),
            opset_imports=dict(whole.graph.opset_imports),
            name=whole.graph.name,
        )
        return onnx_ir.Model(part, ir_version=whole.ir_version)

    def _copy(self, node: onnx_ir.Node) -> onnx_ir.Node:
        inputs = [None if value is None else self._read(value) for value in node.inputs]
        outputs = [onnx_ir.Value(name=computed_name(str(value.name), self.feeds)) for value in node.outputs]
        self.computed.update(zip(node.outputs, outputs, strict=True))
        return onnx_ir.Node(
            node.domain, node.op_type, inputs, node.attributes.values(), outputs=outputs, name=node.name
        )

    def _read(self, value: onnx_ir.Value) -> onnx_ir.Value:
        name = str(value.name)
        if value.is_initializer():
            copy = onnx_ir.Value(name=name, shape=value.shape, type=value.type, const_value=value.const_value)
            return self.initialisers.setdefault(name, copy)
        if name in self.feeds:
            return self.inputs.setdefault(name, onnx_ir.Value(name=name, type=self._type(value)))
        if value not in self.computed:
            raise NvlmError(f"{self.graph.path}: {name} is neither computed nor given")
        return self.computed[value]

    def _output(self, value: onnx_ir.Value) -> onnx_ir.Value:
        output = self.computed[value]
        output.type = self._type(value)
        return output

    def _type(self, value: onnx_ir.Value) -> onnx_ir.TensorType:
        return onnx_ir.TensorType(self.graph.types[value] or DataType.FLOAT)


def nodes_behind(values: Sequence[onnx_ir.Value], feeds: Collection[str]) -> set[onnx_ir.Node]:
    """The nodes that compute the values, back to the nearest feeds; a value that is a feed itself is still computed."""
    found: set[onnx_ir.Node] = set()
    waiting = [node for value in values if (node := value.producer()) is not None]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(_producers(node, feeds))
    return found


def feeds_behind(value: onnx_ir.Value, feeds: Collection[str]) -> set[str]:
    """The feeds that the walk back from a value reaches."""
    read = (source for node in nodes_behind([value], feeds) for source in node.inputs if source is not None)
    return {str(source.name) for source in read if source.name in feeds}


def _producers(node: onnx_ir.Node, feeds: Collection[str]) -> Iterator[onnx_ir.Node]:
    for source in node.inputs:
        producer = None if source is None or source.name in feeds else source.producer()
        if producer is not None:
            yield producer
