"""The stages' graphs joined into one: the block traced once, copied for every layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from nvlm_deploy.vision.stages import Kind, Stage, stages
from nvlm_deploy.vision.trace import OPSET

if TYPE_CHECKING:
    import onnx_ir

    from nvlm_deploy.model.spec import VisionSpec

# IR version of the opset; TensorRT's parser and ONNX Runtime read it
IR_VERSION = 10
TEMPLATE_BLOCK = "block.0"


def joined(vision: VisionSpec, templates: Mapping[Kind, onnx_ir.Model]) -> onnx_ir.Model:
    """One graph of the whole tower from one template of each kind; blocks are copies of `block.0`'s.

    Points keep their names (vision/stages.py), weights get the checkpoint's, and everything else its stage's in front.
    """
    import onnx_ir

    source = templates["prologue"].graph.inputs[0]
    tiles = onnx_ir.Value(name=source.name, shape=source.shape, type=source.type)
    graph = onnx_ir.Graph([tiles], [], nodes=[], opset_imports={"": OPSET}, name="nvlm_vision_encoder")
    states = tiles
    for stage in stages(vision):
        states = _append(graph, templates[stage.kind], stage, states)
    graph.outputs.append(states)
    return onnx_ir.Model(graph, ir_version=IR_VERSION, producer_name="nvlm-deploy")


def _append(graph: onnx_ir.Graph, template: onnx_ir.Model, stage: Stage, states: onnx_ir.Value) -> onnx_ir.Value:
    """A copy of the template's nodes behind `states`; its output."""
    import onnx_ir

    name_of = _namer(stage)
    values: dict[onnx_ir.Value | None, onnx_ir.Value | None] = {None: None, template.graph.inputs[0]: states}
    for initialiser in template.graph.initializers.values():
        values[initialiser] = _initialiser(graph, initialiser, stage)
    for node in template.graph:
        outputs = [onnx_ir.Value(name=name_of(value), shape=value.shape, type=value.type) for value in node.outputs]
        values.update(zip(node.outputs, outputs, strict=True))
        inputs = [values[value] for value in node.inputs]
        copy = onnx_ir.Node(
            node.domain,
            node.op_type,
            inputs,
            node.attributes.values(),
            outputs=outputs,
            name=f"{stage.name}/{node.name}",
        )
        graph.append(copy)
    output = values[template.graph.outputs[0]]
    assert output is not None  # every template computes its output
    return output


def _namer(stage: Stage) -> Callable[[onnx_ir.Value], str]:
    """How a value of a template is called in the whole graph."""
    points = set(stage.points)

    def name_of(value: onnx_ir.Value) -> str:
        name = str(value.name)
        if stage.kind == "block" and (name == TEMPLATE_BLOCK or name.startswith(f"{TEMPLATE_BLOCK}.")):
            name = stage.name + name.removeprefix(TEMPLATE_BLOCK)
        return name if name in points else f"{stage.name}/{name}"

    return name_of


def _initialiser(graph: onnx_ir.Graph, template: onnx_ir.Value, stage: Stage) -> onnx_ir.Value:
    """A weight of this stage, or a constant that all stages of a kind share."""
    import onnx_ir

    is_weight = template.const_value is None
    name = f"{stage.prefix}{template.name}" if is_weight else f"{stage.kind}/{template.name}"
    if name in graph.initializers:
        return graph.initializers[name]
    value = onnx_ir.Value(name=name, shape=template.shape, type=template.type)
    if template.const_value is not None:
        value.const_value = onnx_ir.tensor(template.const_value.numpy(), dtype=template.dtype, name=name)
    graph.initializers.add(value)
    return value
