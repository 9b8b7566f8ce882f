"""The numerics gate: does this vision.onnx compute what the checkpoint computes? Stage by stage, against float32.

The file itself is judged, the one that TensorRT gets. One stage's weights are in memory at a time, as at full size the
file has 11 GB. Five judgements:
- the weights in the file are the checkpoint's (weights.py);
- every operation by itself, fed with the reference's values (bisection.py): whatever fails is thereby named;
- what the numbers can hide, as a norm in half precision, read from the graph (rules.py);
- every point has its name: what has none was not looked at, and such a graph does not pass;
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
from nvlm_deploy.errors import MachineError, NvlmError, RejectedError
from nvlm_deploy.model.spec import ModelSpec
from nvlm_deploy.tensors import EMBEDDINGS, TILES
from nvlm_deploy.vision.calibrate import VisionCalibration
from nvlm_deploy.vision.engine import TILES_PER_RUN
from nvlm_deploy.vision.graph_file import CALIBRATION_NAME
from nvlm_deploy.vision.numerics.bisection import StageInGraph
from nvlm_deploy.vision.numerics.bounds import end_bounds
from nvlm_deploy.vision.numerics.compare import difference
from nvlm_deploy.vision.numerics.operation_result import OperationResult, UnusableOperationError, place_of
from nvlm_deploy.vision.numerics.operations import INPUT, OPERATIONS, Operation, parameters_of, point_name
from nvlm_deploy.vision.numerics.reference import StageReference
from nvlm_deploy.vision.numerics.report import Finding, NumericsReport, StageResult
from nvlm_deploy.vision.numerics.rules import Violation, nearest_point, violations
from nvlm_deploy.vision.numerics.subgraph import VisionGraph
from nvlm_deploy.vision.numerics.weights import scale_problems
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
    bisected: int | None = None,
    on_stage: Callable[[], None] = lambda: None,
    threads: int | None = None,
) -> NumericsReport:
    """Judge a graph on `tiles`, uint8 [tiles, S, S, 3]; `on_stage` is called as each stage is done.

    The graph's own states, to the embeddings, are those of all tiles; operations by themselves, four times the work,
    are compared on the first `bisected` of them (None: on all). Raises NvlmError when the graph is missing, without
    its data, or no vision graph of this model; what it computes wrongly, or cannot compute, is in the report.
    """
    graph = VisionGraph(onnx, threads=threads)
    _require_vision_graph(graph, spec)
    check = _Check(graph, checkpoint, spec, tiles, tiles[:bisected])
    not_bisected = check.not_bisected
    results = check.whole(on_stage) if not_bisected else tuple(check.stages(on_stage))
    findings = check.findings(results)
    return NumericsReport(graph.precision, len(check.bisected), results, findings, not_bisected, check.expected)


class _Check:
    """One graph beside one checkpoint."""

    def __init__(
        self, graph: VisionGraph, checkpoint: Checkpoint, spec: ModelSpec, tiles: Tiles, bisected: Tiles
    ) -> None:
        self.graph, self.checkpoint, self.spec, self.tiles, self.bisected = graph, checkpoint, spec, tiles, bisected
        self.absent = [point for point in self._places if point not in graph.values]
        self.points = frozenset(self._places) - set(self.absent)
        self.expected: npt.NDArray[np.float32] | None = None
        self.found: list[tuple[str | None, Finding]] = []

    @property
    def sources(self) -> Iterator[tuple[Stage, str]]:
        """Every stage and the name of what comes into it."""
        source = TILES.name
        for stage in stages(self.spec.vision):
            yield stage, source
            source = stage.name

    @cached_property
    def not_bisected(self) -> str | None:
        """Why the graph cannot be cut into its stages, if it cannot."""
        lost = [stage.name for stage in stages(self.spec.vision) if stage.name in self.absent]
        return f"it cannot be bisected: the graph has no value named {lost[0]}" if lost else self.wiring

    @property
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
        """Up to the end, or the stage that cannot be run."""
        expected, own = torch.from_numpy(self.tiles), self.tiles
        for stage, source in self.sources:
            reference = self._reference(stage, source, expected)
            part = StageInGraph(self.graph, reference.of_tiles(len(self.bisected)), self.points, self.bisected)
            try:
                results, states = part.results(), self._own_states(stage, source, own, part)
            except UnusableOperationError as problem:
                self.found.append((problem.point, Finding(problem.place, problem.what, stage.name)))
                return
            for name in states:
                yield StageResult(
                    name,
                    difference(torch.from_numpy(states[name]), reference.values[name]),
                    tuple(result for result in results if _row_of(result, states) == name),
                )
            expected, own = reference.values[stage.name], states[stage.name]
            on_stage()
        self.expected = expected.numpy()

    def _reference(self, stage: Stage, source: str, states: torch.Tensor) -> StageReference:
        """The stage's own values; its weights are at hand, so that those of the file are compared here."""
        reference = StageReference(stage, parameters_of(stage, self.checkpoint, self.spec), source, states)
        for point, place, what in StageInGraph(self.graph, reference, self.points, self.tiles).weight_problems():
            self.found.append((point, Finding(place, what, stage.name)))
        return reference

    def _own_states(
        self, stage: Stage, source: str, own: npt.NDArray[Any], part: StageInGraph
    ) -> dict[str, npt.NDArray[Any]]:
        """The stage's output from the candidate's own states, and what else has a line of its own.

        In runs of other numbers of tiles than its operations were compared on: an axis that the exporter froze to the
        number of tiles it was traced with cannot pass both. Raises UnusableOperationError naming what is frozen.
        """
        runs = []
        for chosen in _runs(len(self.tiles), other_than=len(self.bisected)):
            try:
                runs.append(self._run_own(stage, {source: own[chosen], TILES.name: self.tiles[chosen]}))
            except MachineError:
                raise
            except NvlmError as problem:
                raise part.of_tiles(len(chosen)).unusable(problem.message) from problem
            if any(len(array) != len(chosen) for array in runs[-1].values()):
                raise part.of_tiles(len(chosen)).unusable(f"does not give {len(chosen)} tiles for {len(chosen)}")
        return {name: np.concatenate([run[name] for run in runs])[: len(self.tiles)] for name in runs[0]}

    def _run_own(self, stage: Stage, given: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        names = [name for name in ("pixels", "pixel_shuffle") if name in stage.points and name in self.points]
        part = self.graph.subgraph([*names, stage.name], self._outside(stage))
        inputs = {str(value.name): given[str(value.name)] for value in part.graph.inputs}
        found = self.graph.run(part, inputs, [*names, stage.name])
        return dict(zip([*names, stage.name], found, strict=True))

    def whole(self, on_stage: Callable[[], None]) -> tuple[StageResult, ...]:
        """The embeddings only; the whole graph is in memory at once."""
        expected = torch.from_numpy(self.tiles)
        for stage, source in self.sources:
            expected = self._reference(stage, source, expected).values[stage.name]
            on_stage()
        part = self.graph.subgraph([EMBEDDINGS.name], {TILES.name})
        try:
            (found,) = self.graph.run(part, {TILES.name: self.tiles}, [EMBEDDINGS.name])
        except MachineError:
            raise
        except NvlmError as problem:
            self.found.append((EMBEDDINGS.name, Finding(EMBEDDINGS.name, problem.message)))
            return ()
        if found.shape != tuple(expected.shape):
            what = f"shape {list(found.shape)}, expected {list(expected.shape)}"
            self.found.append((EMBEDDINGS.name, Finding(EMBEDDINGS.name, what)))
            return ()
        self.expected = expected.numpy()
        return (StageResult(EMBEDDINGS.name, difference(torch.from_numpy(found), expected), ()),)

    def findings(self, results: Sequence[StageResult]) -> tuple[Finding, ...]:
        """What was not looked at first, then in the order of computation, the embeddings last.

        Of one operation: broken rules, another's weights, wrong values of its own, and its numbers last.
        """
        rows = [result.name for result in results]
        broken = violations(self.graph, self.points, self._norms)
        found = [(violation.point, self._of_rule(violation, rows)) for violation in broken]
        wrong = [
            (bad.point, Finding(bad.place, bad.problem, result.name), bool(bad.misread))
            for result in results
            for bad in result.operations
            if bad.problem
        ]
        found += [(point, finding) for point, finding, misread in wrong if misread]
        found += [*self.found, *self._of_calibration()]
        found += [(point, finding) for point, finding, misread in wrong if not misread]
        order = {point: index for index, point in enumerate(self._places)}
        local = [finding for _, finding in sorted(found, key=lambda pair: order.get(str(pair[0]), -1))]
        return (*self._of_structure(), *local, *self._of_states(results, explained=bool(local)))

    def _of_calibration(self) -> Iterator[tuple[str | None, Finding]]:
        """Scales that are not of the calibration which lies beside the graph."""
        file = self.graph.path.with_name(CALIBRATION_NAME)
        amax = VisionCalibration.load(file).amax if file.is_file() else {}
        for value, what in scale_problems(self.graph, amax):
            point = nearest_point(value, self.points)
            stage, place = self._places.get(str(point), ("", str(value.name)))
            yield point, Finding(place, what, stage)

    def _of_structure(self) -> Iterator[Finding]:
        """What could not be looked at: a graph is not right because nobody looked."""
        if self.absent:
            first, more = self.absent[0], f" and {len(self.absent) - 1} more" if self.absent[1:] else ""
            what = f"the graph has no value named {first}{more}: what computes it is not judged"
            yield Finding(self._places[first][1], what, self._places[first][0])
        elif self.not_bisected:
            yield Finding("the stages", self.not_bisected)

    @cached_property
    def _places(self) -> dict[str, tuple[str, str]]:
        """By point, in order: its stage and what the operation is called."""
        return {
            point_name(stage, operation.point): (stage.name, place_of(stage, operation))
            for stage in stages(self.spec.vision)
            for operation in OPERATIONS[stage.kind]
        }

    @property
    def _norms(self) -> list[str]:
        """Those whose input has its name too."""
        return [
            point_name(stage, operation.point)
            for stage, source in self.sources
            for operation in OPERATIONS[stage.kind]
            if operation.is_norm and self._input_name(stage, source, operation) in self.points
        ]

    def _input_name(self, stage: Stage, source: str, operation: Operation) -> str:
        first = operation.inputs[0]
        return source if first == INPUT else point_name(stage, first)

    def _of_rule(self, violation: Violation, rows: Sequence[str]) -> Finding:
        stage, place = self._places.get(str(violation.point), ("", violation.node))
        what = f"{violation.what} (node {violation.node})"
        return Finding(place, what, str(violation.point) if violation.point in rows else stage)

    def _of_states(self, results: Sequence[StageResult], *, explained: bool) -> Iterator[Finding]:
        """What the candidate's own states show beyond the operations."""
        bad = next((result for result in results if result.accumulated.bad_values), None)
        if bad is not None:
            what = f"{bad.accumulated.bad_values} values of the graph's own states are NaN or infinite"
            yield Finding(bad.name, what, bad.name)
        elif self.expected is not None:
            broken = end_bounds(self.graph.precision).broken(results[-1].accumulated)
            why = "" if explained or self.not_bisected else _why(results)
            if broken:
                yield Finding(EMBEDDINGS.name, f"{', '.join(broken)}{why}", EMBEDDINGS.name)


def _why(results: Sequence[StageResult]) -> str:
    losses = np.diff([1.0, *(result.accumulated.cosine for result in results)])
    steepest = results[int(losses.argmin())].name
    return f"; every operation keeps its bound, the error grows over the stages, most in {steepest}"


def _runs(tiles: int, *, other_than: int) -> list[npt.NDArray[np.int64]]:
    """Which tiles go into which run, at most TILES_PER_RUN at a time; not all runs are of `other_than` tiles.

    The first run is of one tile or, against a comparison on one tile, of two: twice the same if need be.
    """
    if other_than == 1:
        every = np.arange(max(tiles, 2)) % tiles
        return [every[start : start + TILES_PER_RUN] for start in range(0, len(every), TILES_PER_RUN)]
    rest = np.arange(1, tiles)
    return [np.array([0]), *(rest[start : start + TILES_PER_RUN] for start in range(0, len(rest), TILES_PER_RUN))]


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
