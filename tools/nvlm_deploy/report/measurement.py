"""Measurement, Bar, Verdict: what was found, what was demanded, and whether it holds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from nvlm_deploy.manifest import EVIDENCE_LEVELS


@dataclass(frozen=True)
class Measurement:
    """One number: unit, count of observations, 95 % interval where there is one, evidence.

    `evidence` is one of artifacts.EVIDENCE_LEVELS.
    """

    name: str
    value: float
    unit: str
    n: int
    interval: tuple[float, float] | None = None
    evidence: str = "measured"

    def __post_init__(self) -> None:
        if self.evidence not in EVIDENCE_LEVELS:
            raise ValueError(f"{self.name}: no evidence level {self.evidence!r}")


@dataclass(frozen=True)
class Bar:
    """A bound that a measurement must keep."""

    sense: Literal["at least", "at most"]
    bound: float

    def holds(self, value: float) -> bool:
        """Whether the value keeps the bound; NaN keeps none."""
        return value >= self.bound if self.sense == "at least" else value <= self.bound


class Outcome(StrEnum):
    """What a bar says of a measurement."""

    HOLDS = "holds"
    FAILS = "fails"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class Verdict:
    """A measurement judged by a bar."""

    measurement: Measurement
    bar: Bar

    @property
    def outcome(self) -> Outcome:
        return Outcome.HOLDS if self.bar.holds(self.measurement.value) else Outcome.FAILS

    @property
    def holds(self) -> bool:
        return self.outcome is Outcome.HOLDS

    @property
    def what(self) -> str:
        """As `accuracy, tile: at least 97 %`."""
        return f"{self.measurement.name}: {self.bar.sense} {self.bar.bound:g} {self.measurement.unit}".rstrip()

    def as_json(self) -> dict[str, object]:
        """The form of the `bars` in a benchmark's last line."""
        return {"what": self.what, "value": self.measurement.value, "bound": self.bar.bound, "holds": self.holds}


@dataclass(frozen=True)
class IntervalVerdict(Verdict):
    """A measurement whose whole 95 % interval must keep the bar.

    It is undecided where the interval has values on both sides. `decisive_n` observations would then decide, if the
    rest went as what was observed; None where no number would.
    """

    decisive_n: int | None = None

    @property
    def outcome(self) -> Outcome:
        ends = self.measurement.interval or (self.measurement.value,)
        kept = [self.bar.holds(end) for end in ends]
        if all(kept):
            return Outcome.HOLDS
        return Outcome.UNDECIDED if any(kept) else Outcome.FAILS

    def as_json(self) -> dict[str, object]:
        interval, needed = self.measurement.interval, {}
        if self.outcome is Outcome.UNDECIDED:
            needed = {"n_needed": self.decisive_n}
        judged = {"verdict": str(self.outcome), "n": self.measurement.n, "interval_95": interval and list(interval)}
        return super().as_json() | judged | needed


def all_hold(verdicts: Iterable[Verdict]) -> bool:
    """Whether no bar is broken."""
    return all(verdict.holds for verdict in verdicts)
