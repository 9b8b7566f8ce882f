"""Measurement, Bar, Verdict: what was found, what was demanded, and whether it holds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Verdict:
    """A measurement judged by a bar."""

    measurement: Measurement
    bar: Bar

    @property
    def holds(self) -> bool:
        return self.bar.holds(self.measurement.value)

    @property
    def what(self) -> str:
        """As `accuracy, tile: at least 97 %`."""
        return f"{self.measurement.name}: {self.bar.sense} {self.bar.bound:g} {self.measurement.unit}".rstrip()

    def as_json(self) -> dict[str, object]:
        """The form of the `bars` in a benchmark's last line."""
        return {"what": self.what, "value": self.measurement.value, "bound": self.bar.bound, "holds": self.holds}


def all_hold(verdicts: Iterable[Verdict]) -> bool:
    """Whether no bar is broken."""
    return all(verdict.holds for verdict in verdicts)
