"""What the numerics gate found, as a judgement, a sentence and a document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any

import numpy as np
import numpy.typing as npt

from nvlm_deploy.vision.numerics.bounds import Bounds, end_bounds
from nvlm_deploy.vision.numerics.compare import Difference
from nvlm_deploy.vision.numerics.operation_result import Judged, OperationResult

Document = dict[str, Any]


@dataclass(frozen=True)
class StageResult:
    """One line of the table: `accumulated` is of the candidate's own states, `operations` each by itself."""

    name: str
    accumulated: Difference
    operations: tuple[OperationResult, ...]

    @property
    def worst(self) -> OperationResult | None:
        """The operation nearest to its bound, or farthest beyond it."""
        broken = [operation for operation in self.operations if operation.problem]
        return max(broken or self.operations, key=lambda operation: operation.strain, default=None)


@dataclass(frozen=True)
class Finding:
    """One reason to refuse the graph; `place` as `block 17: QK-norm (q)`, `what` as `in fp16: ...`.

    `stage` is that of the table, empty where none is to blame.
    """

    place: str
    what: str
    stage: str = ""

    def __str__(self) -> str:
        return f"{self.place} {self.what}" if self.what.startswith("in ") else f"{self.place}: {self.what}"


@dataclass(frozen=True)
class NumericsReport:
    """The judgement of one graph: its operations on `tiles` tiles, its own states on these and perhaps more.

    `not_bisected` says why there is no table of stages, if there is none. `expected` are the reference's embeddings of
    all tiles, float32 [tiles, tokens, hidden], None where the graph could not be followed to its end.
    """

    precision: str
    tiles: int
    stages: tuple[StageResult, ...]
    findings: tuple[Finding, ...]
    not_bisected: str | None = None
    expected: npt.NDArray[np.float32] | None = field(default=None, repr=False, compare=False)

    @property
    def passed(self) -> bool:
        return not self.findings

    def holds(self, stage: StageResult) -> bool:
        """Whether nothing was found in this stage."""
        return all(finding.stage != stage.name for finding in self.findings)

    @property
    def end(self) -> Difference:
        """Of the embeddings. Raises ValueError where the graph could not be followed so far."""
        if self.expected is None:
            raise ValueError("the graph was not followed to its end")
        return self.stages[-1].accumulated

    @property
    def end_bounds(self) -> Bounds:
        return end_bounds(self.precision)

    @property
    def sentence(self) -> str:
        """The bisection's answer, or that all is well."""
        if self.passed:
            return f"{self.precision} graph: cosine {self.end.cosine:.7f} on {len(self.end.cosines)} tiles"
        first, *others = self.findings
        return f"{first}{_and_more(others)}"

    def as_json(self) -> dict[str, Any]:
        return {
            "precision": self.precision,
            "tiles": self.tiles,
            "passed": self.passed,
            "sentence": self.sentence,
            "not_bisected": self.not_bisected,
            "findings": [asdict(finding) for finding in self.findings],
            "stages": [_stage_as_json(stage, holds=self.holds(stage)) for stage in self.stages],
            "end": self._end_as_json(),
        }

    def _end_as_json(self) -> Document | None:
        if self.expected is None:
            return None
        return {**difference_as_json(self.end), "bound": self.end_bounds.cosine}


def _and_more(others: Sequence[Finding]) -> str:
    places = list(dict.fromkeys(finding.place for finding in others))
    if not places:
        return ""
    shown = ", ".join(places[:3])
    return f" (and {shown}{f' and {len(places) - 3} more' if places[3:] else ''})"


def _stage_as_json(stage: StageResult, *, holds: bool) -> Document:
    return {
        "stage": stage.name,
        "holds": holds,
        "accumulated": difference_as_json(stage.accumulated),
        "operations": [_operation_as_json(operation) for operation in stage.operations],
    }


def _operation_as_json(result: OperationResult) -> Document:
    return {
        "operation": result.place,
        "point": result.point,
        "computed_in": list(result.computes_in),
        **difference_as_json(result.judged.difference),
        "bounds": {name: _finite(value) for name, value in asdict(result.judged.bounds).items()},
        "without_fp8": _judged_as_json(result.unquantised),
        "probe": _judged_as_json(result.probe),
        "problem": result.problem,
    }


def _judged_as_json(judged: Judged | None) -> Document | None:
    if judged is None:
        return None
    return {"max_relative_error": _finite(judged.difference.error), "bound": _finite(judged.bounds.error)}


def difference_as_json(found: Difference) -> Document:
    return {
        "cosine": _finite(found.cosine),
        "max_relative_error": _finite(found.error),
        "per_tile": {
            "cosine": [_finite(value) for value in found.cosines],
            "max_relative_error": [_finite(value) for value in found.errors],
        },
        "bad_values": found.bad_values,
    }


def _finite(value: float) -> float | None:
    """JSON has neither NaN nor infinity."""
    return value if isfinite(value) else None
