"""One stage of a vision graph, operation by operation: each is fed with the reference's values, so that an error shows
where it arises and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir
import torch
from onnx_ir import DataType

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.tensors import TILES
from nvlm_deploy.vision.element_types import FLOAT8_TYPES, FLOAT_TYPES, short_name
from nvlm_deploy.vision.numerics.bounds import Bounds, amplification_of_scores, operation_bounds, roundoff_of
from nvlm_deploy.vision.numerics.compare import Difference, difference
from nvlm_deploy.vision.numerics.operations import Operation, largest_score
from nvlm_deploy.vision.numerics.reference import StageReference, rounded, without_dummy_heads
from nvlm_deploy.vision.numerics.subgraph import VisionGraph, computed_name, feeds_behind, nodes_behind
from nvlm_deploy.vision.numerics.unquantised import UNQUANTISED, without_fp8
from nvlm_deploy.vision.stages import Stage


@dataclass(frozen=True)
class Judged:
    """A difference and what it must keep."""

    difference: Difference
    bounds: Bounds

    @property
    def broken(self) -> list[str]:
        return self.bounds.broken(self.difference)


@dataclass(frozen=True)
class OperationResult:
    """What one operation of the graph makes of the reference's values; `unquantised` is with its FP8 taken out."""

    stage: str
    point: str
    place: str
    computes_in: tuple[str, ...]
    bypassed: tuple[str, ...]
    judged: Judged
    unquantised: Judged | None = None

    @property
    def problem(self) -> str | None:
        """In words; None when all is well."""
        broken = self.judged.broken
        if not broken and self.unquantised is not None and self.unquantised.broken:
            broken = ["without its FP8 " + ", ".join(self.unquantised.broken)]
        if not broken:
            return None
        bypass = f"; it does not read {', '.join(self.bypassed)}" if self.bypassed else ""
        return f"{', '.join(broken)}, computed in {' and '.join(self.computes_in)}{bypass}"

    @property
    def strain(self) -> float:
        """The error as a part of its bound: above 1 it is broken."""
        return self.judged.difference.error / self.judged.bounds.error


@dataclass(frozen=True)
class StageInGraph:
    """A reference beside the same stage of a graph; `points` are the names of all points of all stages there."""

    graph: VisionGraph
    reference: StageReference
    points: frozenset[str]
    tiles: npt.NDArray[np.uint8]

    def results(self) -> list[OperationResult]:
        """Every operation by itself. Raises NvlmError when one gives another shape or cannot be run."""
        found = self._run(self.operations)
        in_fp8 = [operation for operation in self.operations if self._is_fp8(operation)]
        unquantised = self._run(in_fp8, without=without_fp8) if in_fp8 else {}
        return [
            self._result(operation, found[operation.point], unquantised.get(operation.point))
            for operation in self.operations
        ]

    @cached_property
    def operations(self) -> list[Operation]:
        """Those whose result has a name in the graph."""
        return [operation for operation in self.reference.operations if self._name(operation) in self.points]

    @cached_property
    def feeds(self) -> frozenset[str]:
        return self.points | {TILES.name}

    @cached_property
    def rounded(self) -> dict[str, torch.Tensor]:
        """The reference's values as the graph's types hold them; its own where the graph has no such value."""
        values = self.reference.values
        types = {name: self.graph.element_type(name) if name in self.feeds else None for name in values}
        return {name: rounded(value, types[name]) for name, value in values.items()}

    def _name(self, operation: Operation) -> str:
        return self.reference.name(operation.point)

    def _run(
        self, operations: Sequence[Operation], *, without: Callable[[onnx_ir.Model], None] | None = None
    ) -> dict[str, torch.Tensor]:
        """What the graph computes for each, all in one run; by point."""
        names = [self._name(operation) for operation in operations]
        part = self.graph.subgraph(names, self.feeds)
        if without is not None:
            without(part)
        inputs = {str(value.name): self._input(value) for value in part.graph.inputs}
        try:
            found = self.graph.run(part, inputs, [computed_name(name, self.feeds) for name in names])
        except NvlmError as problem:
            raise self._blamed(operations, problem) from problem
        return {operation.point: torch.from_numpy(array) for operation, array in zip(operations, found, strict=True)}

    def _blamed(self, operations: Sequence[Operation], problem: NvlmError) -> NvlmError:
        """One operation that cannot be run takes all others of its stage with it: which one is it?"""
        if len(operations) == 1:
            return NvlmError(f"{place_of(self.reference.stage, operations[0])}: {problem.message}")
        for operation in operations:
            try:
                self._run([operation])
            except NvlmError as its_own:
                return its_own
        return problem

    def _input(self, value: onnx_ir.Value) -> npt.NDArray[Any]:
        name = str(value.name)
        if name == TILES.name:
            return self.tiles
        given: torch.Tensor | None = self.rounded.get(name)
        if name.endswith(UNQUANTISED):
            name = name.removesuffix(UNQUANTISED)
            weight = self.reference.weight(name)
            given = None if weight is None else rounded(weight, value.dtype)
        if given is None:
            raise NvlmError(f"{self.reference.stage.name} reads {name}, which is not of this stage")
        return self._as_exported(name, given).numpy()

    def _result(self, operation: Operation, found: torch.Tensor, unquantised: torch.Tensor | None) -> OperationResult:
        name, place = self._name(operation), place_of(self.reference.stage, operation)
        expected = self._as_exported(name, self.reference.compute(operation, self.rounded))
        if found.shape != expected.shape:
            raise NvlmError(f"{place} gives {list(found.shape)}, expected {list(expected.shape)}")
        types = self._types(operation)
        exact = types - set(FLOAT8_TYPES)
        return OperationResult(
            stage=self.reference.stage.name,
            point=name,
            place=place,
            computes_in=tuple(sorted(map(short_name, types))),
            bypassed=self._bypassed(operation),
            # FP8 is coarse where factors of a product are quantised, and has no excuse elsewhere
            judged=self._judged(operation, found, expected, types if operation.may_be_fp8 else exact),
            unquantised=None if unquantised is None else self._judged(operation, unquantised, expected, exact),
        )

    def _judged(
        self, operation: Operation, found: torch.Tensor, expected: torch.Tensor, types: set[DataType]
    ) -> Judged:
        roundoff, amplification = roundoff_of(types), 1.0
        if operation.point == "attention":
            q, k = (self.rounded[self.reference.name(point)] for point in operation.inputs[:2])
            amplification = amplification_of_scores(largest_score(self.reference.parameters.spec, q, k))
        bounds = operation_bounds(roundoff, has_scale=operation.is_norm, amplification=amplification)
        return Judged(difference(found, expected, roundoff=roundoff), bounds)

    def _is_fp8(self, operation: Operation) -> bool:
        return operation.may_be_fp8 and bool(self._types(operation) & set(FLOAT8_TYPES))

    def _types(self, operation: Operation) -> set[DataType]:
        """What the results inside the operation are of, its own included, and the weights it reads."""
        nodes = nodes_behind([self.graph.values[self._name(operation)]], self.feeds)
        results = (value for node in nodes for value in node.outputs)
        weights = (value for node in nodes for value in node.inputs if value is not None and value.is_initializer())
        types = {self.graph.types[value] for value in (*results, *weights)}
        return {element_type for element_type in types if element_type in (*FLOAT_TYPES, *FLOAT8_TYPES)}

    def _bypassed(self, operation: Operation) -> tuple[str, ...]:
        """Named inputs that the operation should read and does not: the error may lie in what takes their place."""
        read = feeds_behind(self.graph.values[self._name(operation)], self.feeds)
        expected: set[str] = {self.reference.name(point) for point in operation.inputs} & self.points
        return tuple(sorted(expected - read))

    def _as_exported(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Without the dummy heads where the graph has none."""
        vision = self.reference.parameters.spec.vision
        is_pruned = self._attention_width == vision.heads * vision.head_size
        return without_dummy_heads(name, value, vision) if is_pruned else value

    @cached_property
    def _attention_width(self) -> int | None:
        weight = self.graph.values.get(f"{self.reference.stage.prefix}attn.q_norm.weight")
        axes = [] if weight is None or weight.shape is None else list(weight.shape)
        return axes[0] if axes and isinstance(axes[0], int) else None


def place_of(stage: Stage, operation: Operation) -> str:
    """As `block 17: QK-norm (q)`, or `pixel shuffle`."""
    return f"block {stage.name.removeprefix('block.')}: {operation.label}" if stage.kind == "block" else operation.label
