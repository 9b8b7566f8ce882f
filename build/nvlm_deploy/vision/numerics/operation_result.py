"""What the numerics gate says of one operation of a graph."""

from __future__ import annotations

from dataclasses import dataclass

from nvlm_deploy.errors import RejectedError
from nvlm_deploy.vision.numerics.bounds import Bounds
from nvlm_deploy.vision.numerics.compare import Difference
from nvlm_deploy.vision.numerics.operations import Operation, point_name
from nvlm_deploy.vision.stages import Stage


def place_of(stage: Stage, operation: Operation) -> str:
    """As `block 17: QK-norm (q)`, or `pixel shuffle`."""
    return f"block {stage.name.removeprefix('block.')}: {operation.label}" if stage.kind == "block" else operation.label


@dataclass(frozen=True)
class Judged:
    """A difference and what it must keep."""

    difference: Difference
    bounds: Bounds

    @property
    def broken(self) -> list[str]:
        return self.bounds.broken(self.difference)


class UnusableOperationError(RejectedError):
    """An operation that gives nothing to compare; `point` is its full name, `place` as `block 17: QK-norm (q)`."""

    def __init__(self, stage: Stage, operation: Operation, what: str) -> None:
        self.point, self.place, self.what = point_name(stage, operation.point), place_of(stage, operation), what
        super().__init__(f"{self.place}: {what}")


@dataclass(frozen=True)
class OperationResult:
    """What one operation of the graph makes of the reference's values.

    `unquantised` is with its FP8 taken out, `probe` on inputs that single out one of its numbers (probes.py), `misread`
    says which weights it takes for its own, and `bypassed` which inputs it leaves out.
    """

    stage: str
    point: str
    place: str
    computes_in: tuple[str, ...]
    bypassed: tuple[str, ...]
    judged: Judged
    unquantised: Judged | None = None
    probe: Judged | None = None
    probed: str = ""
    misread: str | None = None

    @property
    def problem(self) -> str | None:
        """In words; None when all is well."""
        broken = self._broken
        if not broken:
            return self.misread
        bypass = f"; it does not read {', '.join(self.bypassed)}" if self.bypassed else ""
        misread = f"{self.misread}: " if self.misread else ""
        return f"{misread}{', '.join(broken)}, computed in {' and '.join(self.computes_in)}{bypass}"

    @property
    def _broken(self) -> list[str]:
        """Of the first judgement that does not hold."""
        others = (("without its FP8 ", self.unquantised), (f"{self.probed}: ", self.probe))
        for words, judged in (("", self.judged), *others):
            broken = judged.broken if judged else []
            if broken:
                return [words + broken[0], *broken[1:]]
        return []

    @property
    def strain(self) -> float:
        """The error as a part of its bound: above 1 it is broken."""
        return self.judged.difference.error / self.judged.bounds.error
