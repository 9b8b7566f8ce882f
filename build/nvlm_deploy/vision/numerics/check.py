"""The numerics gate: does this vision.onnx compute what the checkpoint computes? Stage by stage, against float32.

The file itself is judged, the one that TensorRT gets. One stage's weights are in memory at a time, as at full size the
file has 11 GB. Three judgements:
- every operation by itself, fed with the reference's values (bisection.py): whatever fails is thereby named;
- what the numbers can hide, as a norm in half precision, read from the graph (rules.py);
- the candidate's own states, flowing from the tiles to the embeddings: how far errors grow over the blocks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nvlm_deploy.checkpoint.reader import Checkpoint
from nvlm_deploy.errors import NvlmError, RejectedError
from nvlm_deploy.model.spec import ModelSpec
from nvlm_deploy.tensors import EMBEDDINGS, TILES
from nvlm_deploy.vision.numerics.bisection import OperationResult, StageInGraph, place_of
from nvlm_deploy.vision.numerics.bounds import end_bounds
from nvlm_deploy.vision.numerics.compare import difference
from nvlm_deploy.vision.numerics.operations import OPERATIONS, parameters_of, point_name
from nvlm_deploy.vision.numerics.reference import StageReference
from nvlm_deploy.vision.numerics.report import Finding, NumericsReport, StageResult
from nvlm_deploy.vision.numerics.rules import Violation, violations
from nvlm_deploy.vision.numerics.subgraph import VisionGraph
from nvlm_deploy.vision.stages import Stage, stages

log = logging.getLogger(__name__)

Tiles = npt.NDArray[np.uint8]


def require_numerics(onnx: Path, checkpoint: Checkpoint, spec: ModelSpec, tiles: Tiles, **more: Any) -> NumericsReport:
    """`check_numerics`; raises RejectedError with the bisection's sentence when the graph fails."""
    report = check_numerics(onnx, checkpoint, spec, tiles, **more)
    if not report.passed:
        raise RejectedError(
            f"{onnx} fails its numerics gate: {report.sentence}", hint="`nvlm validate numerics` prints the table"
        )
    log.info("%s passes its numerics gate: %s", onnx, report.sentence)
    return report


def check_numerics(
    onnx: Path,
    checkpoint: Checkpoint,
    spec: ModelSpec,
    tiles: Tiles,
    *,
    on_stage: Callable[[], None] = lambda: None,
    threads: int | None = None,
) -> NumericsReport:
    """Judge a graph on `tiles`, uint8 [tiles, S, S, 3]; `on_stage` is called as each stage is done.

    Raises NvlmError when the graph is missing, no vision graph of this model, or cannot be run.
    """
    graph = VisionGraph(onnx, threads=threads)
    _require_vision_graph(graph, spec)
    check = _Check(graph, checkpoint, spec, tiles)
    not_bisected = check.missing or check.wiring
    results = check.whole(on_stage) if not_bisected else tuple(check.stages(on_stage))
    findings = check.findings(results)
    return NumericsReport(graph.precision, len(tiles), results, findings, not_bisected)


class _Check:
    """One graph beside one checkpoint."""

    def __init__(self, graph: VisionGraph, checkpoint: Checkpoint, spec: ModelSpec, tiles: Tiles) -> None:
        self.graph, self.checkpoint, self.spec, self.tiles = graph, checkpoint, spec, tiles
        named = [point for stage in stages(spec.vision) for point in stage.points]
        self.points = frozenset(name for name in named if name in graph.values)
        self.absent = [stage.name for stage in stages(spec.vision) if stage.name not in graph.values]

    @property
    def sources(self) -> Iterator[tuple[Stage, str]]:
        """Every stage and the name of what comes into it."""
        source = TILES.name
        for stage in stages(self.spec.vision):
            yield stage, source
            source = stage.name

    @property
    def missing(self) -> str | None:
        if not self.absent:
            return None
        more = f" and {len(self.absent) - 1} more" if self.absent[1:] else ""
        return f"it cannot be bisected: the graph has no value named {self.absent[0]}{more}"

    @cached_property
    def wiring(self) -> str | None:
        """A stage that does not read the stage before it: then stages are not the graph cut into pieces."""
        for stage, source in self.sources:
            read = self._read_by(stage)
            if source not in read or read - {source, TILES.name}:
                return f"it cannot be bisected: {stage.name} reads {', '.join(sorted(read))}, not {source}"
        return None

    def _read_by(self, stage: Stage) -> set[str]:
        outside = self._outside(stage)
        return {str(value.name) for value in self.graph.subgraph([stage.name], outside).graph.inputs}

    def _outside(self, stage: Stage) -> frozenset[str]:
        return (self.points | {TILES.name}) - set(stage.points)

    def stages(self, on_stage: Callable[[], None]) -> Iterator[StageResult]:
        expected, own = torch.from_numpy(self.tiles), self.tiles
        for stage, source in self.sources:
            reference = self._reference(stage, source, expected)
            results = StageInGraph(self.graph, reference, self.points, self.tiles).results()
            states = self._own_states(stage, source, own)
            for name in states:
                yield StageResult(
                    name,
                    difference(torch.from_numpy(states[name]), reference.values[name]),
                    tuple(result for result in results if _row_of(result, states) == name),
                )
            expected, own = reference.values[stage.name], states[stage.name]
            on_stage()

    def _reference(self, stage: Stage, source: str, states: torch.Tensor) -> StageReference:
        return StageReference(stage, parameters_of(stage, self.checkpoint, self.spec), source, states)

    def _own_states(self, stage: Stage, source: str, own: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        """The stage's output from the candidate's own states, and what else has a line of its own."""
        names = [name for name in ("pixels", "pixel_shuffle") if name in stage.points and name in self.points]
        part = self.graph.subgraph([*names, stage.name], self._outside(stage))
        given = {source: own, TILES.name: self.tiles}
        inputs = {str(value.name): given[str(value.name)] for value in part.graph.inputs}
        try:
            found = self.graph.run(part, inputs, [*names, stage.name])
        except NvlmError as problem:
            raise NvlmError(f"{stage.name}: {problem.message}") from problem
        return dict(zip([*names, stage.name], found, strict=True))

    def whole(self, on_stage: Callable[[], None]) -> tuple[StageResult, ...]:
        """The embeddings only; the whole graph is in memory at once."""
        expected = torch.from_numpy(self.tiles)
        for stage, source in self.sources:
            expected = self._reference(stage, source, expected).values[stage.name]
            on_stage()
        part = self.graph.subgraph([EMBEDDINGS.name], {TILES.name})
        (found,) = self.graph.run(part, {TILES.name: self.tiles}, [EMBEDDINGS.name])
        if found.shape != tuple(expected.shape):
            raise NvlmError(f"{self.graph.path} gives {list(found.shape)}, expected {list(expected.shape)}")
        return (StageResult(EMBEDDINGS.name, difference(torch.from_numpy(found), expected), ()),)

    def findings(self, results: Sequence[StageResult]) -> tuple[Finding, ...]:
        """In the order of computation; of one operation the broken rule comes first, its numbers after."""
        rows = [result.name for result in results]
        found = [(violation.point, self._of_rule(violation, rows)) for violation in violations(self.graph, self.points)]
        for result in results:
            for bad in result.operations:
                if bad.problem:
                    found.append((bad.point, Finding(bad.place, bad.problem, result.name)))
        order = {point: index for index, point in enumerate(self._places)}
        local = [finding for _, finding in sorted(found, key=lambda pair: order.get(str(pair[0]), -1))]
        return tuple(local + self._of_states(results, explained=bool(local)))

    @cached_property
    def _places(self) -> dict[str, tuple[str, str]]:
        """By point, in order: its stage and what the operation is called."""
        return {
            point_name(stage, operation.point): (stage.name, place_of(stage, operation))
            for stage in stages(self.spec.vision)
            for operation in OPERATIONS[stage.kind]
        }

    def _of_rule(self, violation: Violation, rows: Sequence[str]) -> Finding:
        stage, place = self._places.get(str(violation.point), ("", violation.node))
        what = f"{violation.what} (node {violation.node})"
        return Finding(place, what, str(violation.point) if violation.point in rows else stage)

    def _of_states(self, results: Sequence[StageResult], *, explained: bool) -> list[Finding]:
        """What the candidate's own states show beyond the operations."""
        if not self.missing and self.wiring:
            return [Finding("the stages", self.wiring)]
        bad = next((result for result in results if result.accumulated.bad_values), None)
        if bad is not None:
            what = f"{bad.accumulated.bad_values} values of the graph's own states are NaN or infinite"
            return [Finding(bad.name, what, bad.name)]
        broken = end_bounds(self.graph.precision).broken(results[-1].accumulated)
        why = "" if explained else self._why(results)
        return [Finding(EMBEDDINGS.name, f"{', '.join(broken)}{why}", EMBEDDINGS.name)] if broken else []

    def _why(self, results: Sequence[StageResult]) -> str:
        if self.missing:
            return f"; {self.missing}"
        losses = np.diff([1.0, *(result.accumulated.cosine for result in results)])
        steepest = results[int(losses.argmin())].name
        return f"; every operation keeps its bound, the error grows over the stages, most in {steepest}"


def _row_of(result: OperationResult, rows: dict[str, Any]) -> str:
    """Points with a line of their own; all others belong to their stage's."""
    return result.point if result.point in rows else result.stage


def _require_vision_graph(graph: VisionGraph, spec: ModelSpec) -> None:
    """Raises NvlmError unless it maps tiles of this model to embeddings."""
    names = [[str(value.name) for value in values] for values in (graph.model.graph.inputs, graph.model.graph.outputs)]
    if names != [[TILES.name], [EMBEDDINGS.name]]:
        raise NvlmError(f"{graph.path} maps {names[0]} to {names[1]}: not a vision graph of this tool")
    size = spec.tiling.tile_size
    shape = list(graph.model.graph.inputs[0].shape or ())[1:]
    if shape != [size, size, 3]:
        raise NvlmError(f"{graph.path} takes tiles of {shape}, this checkpoint's are {[size, size, 3]}")
