"""What a vision graph must keep whatever the numbers say, because on mild activations they hide it.

Norms and softmax compute in float32 whatever the base type: a norm in half precision drowns in rounding noise until
real activations overflow its squares (pains no. 8). GELU is the exact one. What counts is what the operators compute,
not what the values are called; for a norm between named points also not which operators they are: from its input to the
product that applies its statistic to the channels everything is float32.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace

import onnx_ir

from nvlm_deploy.tensors import TILES
from nvlm_deploy.vision.element_types import HALF_TYPES, short_name
from nvlm_deploy.vision.numerics.subgraph import VisionGraph, nodes_behind

REDUCTIONS = ("ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2", "ReduceL1", "ReduceMax", "ReduceLogSumExp")
WHOLE_NORMS = (
    "LayerNormalization",
    "RMSNormalization",
    "GroupNormalization",
    "InstanceNormalization",
    "LpNormalization",
    "MeanVarianceNormalization",
)
SOFTMAXES = ("Softmax", "LogSoftmax", "Exp")
STANDARD_DOMAINS = ("", "ai.onnx")
SQUARES = ("Pow", "Mul")
# what may stand between a square and its mean without computing anything
MOVES = ("Cast", "CastLike", "Slice", "Reshape", "Transpose", "Identity", "Split", "Squeeze", "Unsqueeze", "Gather")


@dataclass(frozen=True)
class Violation:
    """A broken rule: `what` as `in fp16: ...`; `point` is the first named value that depends on it."""

    point: str | None
    node: str
    what: str


def violations(graph: VisionGraph, points: Collection[str], norms: Collection[str] = ()) -> list[Violation]:
    """Broken rules, one for each point and kind, in the order of the nodes; `norms` are the points that norms give.

    A norm in the wrong type is told once, not again as a value of a foreign type.
    """
    found: dict[tuple[str | None, str], Violation] = {}
    feeds = frozenset(points) | {TILES.name}
    by_operator = (_violation(value, what, points) for value, what in _broken_rules(graph))
    in_norms = (violation for norm in norms if norm in points for violation in _broken_norm(graph, norm, feeds))
    for violation in (*by_operator, *in_norms):
        found.setdefault((violation.point, violation.what), violation)
    told = {violation.point for violation in found.values()}
    for value, what in _foreign_values(graph):
        violation = _violation(value, what, points)
        if violation.point not in told:
            found.setdefault((violation.point, what), violation)
    return list(found.values())


def _violation(value: onnx_ir.Value, what: str, points: Collection[str]) -> Violation:
    producer = value.producer()
    return Violation(nearest_point(value, points), str((producer and producer.name) or value.name), what)


def nearest_point(value: onnx_ir.Value, points: Collection[str]) -> str | None:
    """The first named value on the way from a value to the graph's output, itself included."""
    waiting, seen = deque([value]), {value}
    while waiting:
        value = waiting.popleft()
        if value.name in points:
            return str(value.name)
        ahead = [output for use in value.uses() for output in use.node.outputs if output not in seen]
        waiting.extend(ahead)
        seen.update(ahead)
    return None


def _broken_rules(graph: VisionGraph) -> Iterator[tuple[onnx_ir.Value, str]]:
    for node in graph.model.graph:
        if node.op_type == "Gelu" and node.attributes.get_string("approximate", "none") != "none":
            yield node.outputs[0], "in its tanh approximation: the model's GELU is exact"
        if node.domain not in STANDARD_DOMAINS:
            yield node.outputs[0], f"in {node.domain}.{node.op_type}: what such an operator computes cannot be judged"
        yield from _not_float32(graph, _float32_only(node))


def _not_float32(graph: VisionGraph, values: Iterable[onnx_ir.Value]) -> Iterator[tuple[onnx_ir.Value, str]]:
    for value in values:
        if graph.types[value] in HALF_TYPES:
            yield value, f"in {short_name(graph.types[value])}: norms and softmax must compute in fp32"


def _broken_norm(graph: VisionGraph, norm: str, feeds: Collection[str]) -> Iterator[Violation]:
    """Told of the norm itself, whatever other point its values reach first."""
    for value, what in _not_float32(graph, _statistic_and_product(graph, graph.values[norm], feeds)):
        yield replace(_violation(value, what, ()), point=norm)


def _statistic_and_product(graph: VisionGraph, norm: onnx_ir.Value, feeds: Collection[str]) -> Iterator[onnx_ir.Value]:
    """The product of a norm's input with its statistic, and all that is computed on the way to it.

    Behind the product only weights and casts follow, in the type of the graph. What of the input has merely been moved
    may be of the input's type.
    """
    product = _last_joining(norm, feeds)
    if product is None:
        return
    yield from product.outputs
    for node in nodes_behind(product.outputs, feeds):
        for value in (*node.inputs, *node.outputs):
            if value is not None and not _is_constant(value) and not _is_input_moved(graph, value, feeds):
                yield value
        if node.op_type not in MOVES:
            yield from (value for value in node.inputs if value is not None)


def _last_joining(value: onnx_ir.Value, feeds: Collection[str]) -> onnx_ir.Node | None:
    """The last node before a value that reads two values, or that is a norm by itself."""
    node = value.producer()
    while node is not None and node.op_type not in WHOLE_NORMS:
        sources = [source for source in node.inputs if source is not None and not _is_constant(source)]
        if len(sources) != 1:
            return node
        node = None if sources[0].name in feeds else sources[0].producer()
    return node


def _is_input_moved(graph: VisionGraph, value: onnx_ir.Value, feeds: Collection[str]) -> bool:
    """Whether it is a named value, or one that was only moved, in the type that this has."""
    source: onnx_ir.Value | None = value
    while source is not None and source.name not in feeds:
        producer = source.producer()
        source = producer.inputs[0] if producer is not None and producer.op_type in MOVES else None
    return source is not None and graph.types[value] == graph.types[source]


def _foreign_values(graph: VisionGraph) -> Iterator[tuple[onnx_ir.Value, str]]:
    """A second 16-bit type: bf16 does not hold fp16's digits, nor fp16 bf16's range. The output may differ."""
    for node in graph.model.graph:
        for value in node.outputs:
            element_type = graph.types[value]
            if element_type in HALF_TYPES and element_type != graph.base_type and not value.is_graph_output():
                yield value, f"in {short_name(element_type)}: this graph computes in {short_name(graph.base_type)}"


def _float32_only(node: onnx_ir.Node) -> Iterator[onnx_ir.Value]:
    """What of a norm or a softmax is to be float32, seen from its characteristic operator."""
    if node.op_type in REDUCTIONS:
        yield from _data_inputs(node)
        yield from _square_before(node)
        yield from _statistic_after(node)
    elif node.op_type in SOFTMAXES:
        # the scores themselves may come in 16 bits: without that TensorRT does not fuse attention (vision/trace.py)
        yield from _data_inputs(node)
        yield node.outputs[0]
    elif node.op_type in WHOLE_NORMS:
        yield from _data_inputs(node)
        yield node.outputs[0]


def _data_inputs(node: onnx_ir.Node) -> Iterator[onnx_ir.Value]:
    if node.inputs and node.inputs[0] is not None:
        yield node.inputs[0]


def _moved_into(node: onnx_ir.Node) -> Iterator[onnx_ir.Value]:
    """Its first input and what it was before mere moves and casts; the last one yielded is what was computed."""
    value = node.inputs[0]
    while value is not None:
        yield value
        producer = value.producer()
        value = producer.inputs[0] if producer is not None and producer.op_type in MOVES else None


def _square_before(reduction: onnx_ir.Node) -> Iterator[onnx_ir.Value]:
    """The square whose mean it is and all on the way; nothing for the plain mean of a LayerNorm."""
    way = list(_moved_into(reduction))
    producer = way[-1].producer()
    if producer is not None and producer.op_type in SQUARES:
        yield from way
        yield from _data_inputs(producer)


def _statistic_after(reduction: onnx_ir.Node) -> Iterator[onnx_ir.Value]:
    """From the mean to the product that applies it to the channels, both included."""
    statistic = {reduction.outputs[0]}
    waiting = deque(statistic)
    while waiting:
        value = waiting.popleft()
        yield value
        for use in value.uses():
            others = [source for source in use.node.inputs if source is not None and source not in statistic]
            if all(_is_constant(source) for source in others):
                waiting.extend(output for output in use.node.outputs if output not in statistic)
                statistic.update(use.node.outputs)
            else:
                yield from use.node.outputs


def _is_constant(value: onnx_ir.Value) -> bool:
    producer = value.producer()
    if producer is None:
        return value.is_initializer()
    return all(source is None or _is_constant(source) for source in producer.inputs)
