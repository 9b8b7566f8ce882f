"""One stage of the float32 reference, and its values in the form that a graph takes them."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy

import torch
from onnx_ir import DataType

from nvlm_deploy.model.spec import VisionSpec
from nvlm_deploy.vision.numerics.operations import INPUT, OPERATIONS, Operation, Parameters, point_name
from nvlm_deploy.vision.stages import Stage

# points and weights whose last axis goes over the heads once
_ONE_OF_EACH_HEAD = (
    ".q_norm",
    ".k_norm",
    ".attention",
    ".attn.q_norm.weight",
    ".attn.k_norm.weight",
    ".attn.proj.weight",
)
_TORCH_TYPES = {DataType.BFLOAT16: torch.bfloat16, DataType.FLOAT16: torch.float16}


class StageReference:
    """One stage in float32 on the checkpoint as it is; `values` by full name, the stage's input among them.

    `source` is the name of the input: the stage before, or the tiles.
    """

    def __init__(self, stage: Stage, parameters: Parameters, source: str, states: torch.Tensor) -> None:
        self.stage, self.parameters, self.source = stage, parameters, source
        self.values = {source: states}
        for operation in self.operations:
            self.values[self.name(operation.point)] = self.compute(operation, self.values)

    @property
    def operations(self) -> tuple[Operation, ...]:
        return OPERATIONS[self.stage.kind]

    def name(self, point: str) -> str:
        """The full name of a point of this stage."""
        return self.source if point == INPUT else point_name(self.stage, point)

    def compute(self, operation: Operation, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The operation on given values of its inputs."""
        inputs = [values[self.name(point)] for point in operation.inputs]
        with torch.inference_mode():
            return operation.compute(self.parameters, *inputs)

    def of_tiles(self, count: int) -> StageReference:
        """The same stage on the first tiles; where there are fewer, they repeat."""
        other = copy(self)
        other.values = {name: value[torch.arange(count) % len(value)] for name, value in self.values.items()}
        return other

    def weight(self, name: str) -> torch.Tensor | None:
        """By its name in the checkpoint; None for what is no weight of this stage."""
        return self.parameters.weights.get(name.removeprefix(self.stage.prefix))


def rounded(value: torch.Tensor, element_type: DataType | None) -> torch.Tensor:
    """As a type of the graph holds it, in float32."""
    narrow = _TORCH_TYPES.get(element_type or DataType.FLOAT)
    return value.to(narrow).float() if narrow else value


def without_dummy_heads(name: str, value: torch.Tensor, vision: VisionSpec) -> torch.Tensor:
    """A point or weight of a block in a graph of the real heads only; dummy heads trail in each of q, k and v."""
    real = vision.heads * vision.head_size
    if name.endswith(".qkv"):
        return torch.cat([part[..., :real] for part in value.chunk(3, dim=-1)], dim=-1)
    if name.endswith(".attn.qkv.weight"):
        return torch.cat([part[:real] for part in value.chunk(3)])
    return value[..., :real] if name.endswith(_ONE_OF_EACH_HEAD) else value
