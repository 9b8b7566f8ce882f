"""One stage of a vision graph, operation by operation: each is fed with the reference's values, so that an error shows
where it arises and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir
import torch
from onnx_ir import DataType

from nvlm_deploy.errors import MachineError, NvlmError
from nvlm_deploy.model.inventory import vision_tensors
from nvlm_deploy.tensors import TILES
from nvlm_deploy.vision.element_types import FLOAT8_TYPES, FLOAT_TYPES, short_name
from nvlm_deploy.vision.numerics.bounds import (
    amplification_of_scores,
    operation_bounds,
    probe_bounds,
    roundoff_of,
)
from nvlm_deploy.vision.numerics.compare import difference
from nvlm_deploy.vision.numerics.operation_result import Judged, OperationResult, UnusableOperationError, place_of
from nvlm_deploy.vision.numerics.operations import Operation, largest_score
from nvlm_deploy.vision.numerics.probes import PROBES, largest_probe_score
from nvlm_deploy.vision.numerics.reference import StageReference, rounded, without_dummy_heads
from nvlm_deploy.vision.numerics.subgraph import VisionGraph, computed_name, feeds_behind, nodes_behind
from nvlm_deploy.vision.numerics.unquantised import UNQUANTISED, without_fp8
from nvlm_deploy.vision.numerics.weights import weight_problem

Values = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class StageInGraph:
    """A reference beside the same stage of a graph; `points` are the names of all points of all stages there."""

    graph: VisionGraph
    reference: StageReference
    points: frozenset[str]
    tiles: npt.NDArray[np.uint8]

    def results(self) -> list[OperationResult]:
        """Every operation by itself. Raises UnusableOperationError when one gives another shape or cannot be run."""
        found = self._run(self.operations, self.rounded)
        in_fp8 = [
            operation for operation in self.operations if self._is_fp8(operation) and not self._misread(operation)
        ]
        unquantised = self._run(in_fp8, self.rounded, without=without_fp8)
        probed = self.of_tiles(1)._probed()
        return [
            self._result(operation, found[operation.point], unquantised.get(operation.point), probed)
            for operation in self.operations
        ]

    def weight_problems(self) -> Iterator[tuple[str, str, str]]:
        """What the file holds beside the checkpoint's weights: point and place of the operation, and what is wrong."""
        prefix = self.reference.stage.prefix
        for operation in self.reference.operations:
            for name in operation.weights:
                expected = self._as_exported(prefix + name, self.reference.parameters.weights[name])
                problem = weight_problem(self.graph, prefix + name, expected)
                if problem:
                    yield self._name(operation), place_of(self.reference.stage, operation), problem

    def of_tiles(self, count: int) -> StageInGraph:
        """The same on the first tiles; where there are fewer, they repeat."""
        tiles = self.tiles[np.arange(count) % len(self.tiles)]
        return replace(self, reference=self.reference.of_tiles(count), tiles=tiles)

    def unusable(self, problem: str) -> UnusableOperationError:
        """Which operation of a stage that fails on so many tiles is to blame? The last where each runs by itself."""
        for operation in self.operations:
            try:
                self._run([operation], self.rounded)
            except UnusableOperationError as its_own:
                return its_own
        what = f"on {len(self.tiles)} tile(s) {problem}"
        return UnusableOperationError(self.reference.stage, self.reference.operations[-1], what)

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
        return {name: self._as_graph_holds(name, value) for name, value in self.reference.values.items()}

    def _as_graph_holds(self, name: str, value: torch.Tensor) -> torch.Tensor:
        return rounded(value, self.graph.element_type(name) if name in self.feeds else None)

    def _name(self, operation: Operation) -> str:
        return self.reference.name(operation.point)

    def _probed(self) -> dict[str, Judged]:
        """Of one tile: norms in one run, the others in another, because both make up their own `qkv`."""
        with_probe = [operation for operation in self.operations if operation.point in PROBES]
        norms = [operation for operation in with_probe if operation.is_norm]
        others = [operation for operation in with_probe if not operation.is_norm]
        return {**self._probed_together(norms), **self._probed_together(others)}

    def _probed_together(self, operations: Sequence[Operation]) -> dict[str, Judged]:
        values = dict(self.rounded)
        for operation in operations:
            given = {point: self.reference.values[self.reference.name(point)] for point in operation.inputs}
            for point, probe in PROBES[operation.point].inputs(self.reference.parameters.spec, given).items():
                name = self.reference.name(point)
                values[name] = self._as_graph_holds(name, probe)
        found = self._run(operations, values, without=without_fp8)
        return {
            operation.point: self._judged_probe(operation, found[operation.point], values) for operation in operations
        }

    def _judged_probe(self, operation: Operation, found: torch.Tensor, values: Values) -> Judged:
        expected = self._expected(operation, found, values)
        roundoff, amplification = roundoff_of(self._types(operation) - set(FLOAT8_TYPES)), 1.0
        if operation.point == "attention":
            amplification = amplification_of_scores(largest_probe_score(self.reference.parameters.spec))
        bounds = probe_bounds(roundoff, amplification=amplification)
        return Judged(difference(found, expected, roundoff=roundoff), bounds)

    def _run(
        self,
        operations: Sequence[Operation],
        values: Values,
        *,
        without: Callable[[onnx_ir.Model], None] = lambda _: None,
    ) -> dict[str, torch.Tensor]:
        """What the graph computes for each from `values`, all in one run; by point.

        Raises UnusableOperationError for the first that cannot be run.
        """
        if not operations:
            return {}
        names = [self._name(operation) for operation in operations]
        part = self.graph.subgraph(names, self.feeds)
        without(part)
        try:
            inputs = {str(value.name): self._input(value, values) for value in part.graph.inputs}
            found = self.graph.run(part, inputs, [computed_name(name, self.feeds) for name in names])
        except MachineError:
            raise
        except NvlmError as problem:
            raise self._blamed(operations, values, without, problem) from problem
        return {operation.point: torch.from_numpy(array) for operation, array in zip(operations, found, strict=True)}

    def _blamed(
        self,
        operations: Sequence[Operation],
        values: Values,
        without: Callable[[onnx_ir.Model], None],
        problem: NvlmError,
    ) -> NvlmError:
        """One operation that cannot be run takes all others of its stage with it: which one is it?"""
        if len(operations) == 1:
            what = f"on {len(self.tiles)} tile(s) {problem.message}"
            return UnusableOperationError(self.reference.stage, operations[0], what)
        for operation in operations:
            try:
                self._run([operation], values, without=without)
            except UnusableOperationError as its_own:
                return its_own
        return UnusableOperationError(self.reference.stage, operations[-1], problem.message)

    def _input(self, value: onnx_ir.Value, values: Values) -> npt.NDArray[Any]:
        name = str(value.name)
        if name == TILES.name:
            return self.tiles
        given: torch.Tensor | None = values.get(name)
        if name.endswith(UNQUANTISED):
            name = name.removesuffix(UNQUANTISED)
            weight = self.reference.weight(name)
            given = None if weight is None else rounded(weight, value.dtype)
        if given is None:
            raise NvlmError(f"it reads {name}, which is not of this stage")
        return self._as_exported(name, given).numpy()

    def _expected(self, operation: Operation, found: torch.Tensor, values: Values) -> torch.Tensor:
        """The reference's, in the shape that was found. Raises UnusableOperationError when that cannot be."""
        expected = self._as_exported(self._name(operation), self.reference.compute(operation, values))
        if found.shape != expected.shape:
            what = f"gives {list(found.shape)}, expected {list(expected.shape)}"
            raise UnusableOperationError(self.reference.stage, operation, what)
        return expected

    def _result(
        self,
        operation: Operation,
        found: torch.Tensor,
        unquantised: torch.Tensor | None,
        probed: Mapping[str, Judged],
    ) -> OperationResult:
        expected = self._expected(operation, found, self.rounded)
        types = self._types(operation)
        exact = types - set(FLOAT8_TYPES)
        probe = PROBES.get(operation.point)
        return OperationResult(
            stage=self.reference.stage.name,
            point=self._name(operation),
            place=place_of(self.reference.stage, operation),
            computes_in=tuple(sorted(map(short_name, types))),
            bypassed=self._bypassed(operation),
            # FP8 is coarse where factors of a product are quantised, and has no excuse elsewhere
            judged=self._judged(operation, found, expected, types if operation.may_be_fp8 else exact),
            unquantised=None if unquantised is None else self._judged(operation, unquantised, expected, exact),
            probe=probed.get(operation.point),
            probed=probe.what if probe else "",
            misread=self._misread(operation),
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

    def _misread(self, operation: Operation) -> str | None:
        """Weights of the model that it reads for its own, in words; without names it is not known where it begins."""
        if not {self.reference.name(point) for point in operation.inputs} <= self.feeds:
            return None
        names, initialisers = vision_tensors(self.reference.parameters.spec).keys(), self.graph.model.graph.initializers
        own = {self.reference.stage.prefix + name for name in operation.weights} & initialisers.keys()
        nodes = nodes_behind([self.graph.values[self._name(operation)]], self.feeds)
        read = {str(value.name) for node in nodes for value in node.inputs if value is not None} & names
        strangers, unread = sorted(read - own), sorted(own - read)
        if strangers:
            return f"reads {', '.join(strangers)}{f', not {unread[0]}' if unread else ''}"
        return f"does not read {', '.join(unread)}" if unread else None

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
