"""Accuracy with its interval, the paired comparison of two models on the same questions, and percentiles of times."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Standard normal quantile of a two-sided 95 % interval.
Z_95 = 1.959963984540054
_MOST_QUESTIONS = 10**8


@dataclass(frozen=True)
class Accuracy:
    """`right` of `total` answers."""

    right: int
    total: int

    def __post_init__(self) -> None:
        if not 0 <= self.right <= self.total or self.total == 0:
            raise ValueError(f"{self.right} right of {self.total}")

    @property
    def percent(self) -> float:
        return 100 * self.right / self.total

    @property
    def interval_percent(self) -> tuple[float, float]:
        low, high = wilson_interval(self.right, self.total)
        return 100 * low, 100 * high


def wilson_interval(right: int, total: int) -> tuple[float, float]:
    """95 % score interval of a proportion, within 0..1 (Wilson 1927); unlike the normal one it is sane at 0 and 1."""
    share, z2 = right / total, Z_95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = Z_95 / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class PairedDifference:
    """Candidate minus reference on the same questions: how often only one of them was right."""

    only_candidate: int
    only_reference: int
    total: int

    @property
    def points(self) -> float:
        """Difference in percentage points; negative when the candidate is worse."""
        return 100 * (self.only_candidate - self.only_reference) / self.total

    @property
    def interval_points(self) -> tuple[float, float]:
        """95 %, of two dependent proportions (Agresti and Min 2005: half a count added to each of the four cells)."""
        return self._interval_points(1.0)

    def decisive_total(self, points: float) -> int | None:
        """The least number of questions at which the interval would not hold `points` any more, if the two went on to
        differ as often as in these. None where there is none: the difference is `points` itself.
        """
        most = 1
        while self._holds(points, most):
            most *= 2
            if most > _MOST_QUESTIONS:
                return None
        return bisect.bisect_left(range(most), True, key=lambda total: not self._holds(points, total))

    def _holds(self, points: float, total: int) -> bool:
        low, high = self._interval_points(total / self.total)
        return low < points < high

    def _interval_points(self, factor: float) -> tuple[float, float]:
        """The interval of so many times as many questions."""
        gained, lost = factor * self.only_candidate + 0.5, factor * self.only_reference + 0.5
        total = factor * self.total + 2
        difference = (gained - lost) / total
        half = Z_95 * math.sqrt((gained + lost) / total - difference**2) / math.sqrt(total)
        return 100 * (difference - half), 100 * (difference + half)


def paired_difference(reference: Sequence[bool], candidate: Sequence[bool]) -> PairedDifference:
    """Compare rightness question by question; the sequences must have the same order."""
    pairs = list(zip(reference, candidate, strict=True))
    return PairedDifference(
        only_candidate=sum(new and not old for old, new in pairs),
        only_reference=sum(old and not new for old, new in pairs),
        total=len(pairs),
    )


@dataclass(frozen=True)
class Percentiles:
    """Median and 95th percentile of `n` times."""

    p50_ms: float
    p95_ms: float
    n: int


def percentiles(times_s: Sequence[float]) -> Percentiles:
    """Of times in seconds; linear between ranks."""
    p50, p95 = np.percentile(np.asarray(times_s) * 1000, [50, 95])
    return Percentiles(float(p50), float(p95), len(times_s))


@dataclass(frozen=True)
class Latency:
    """Times of single requests. `per_token` pools the gaps between tokens of all answers; None if all had one token."""

    time_to_first_token: Percentiles
    per_token: Percentiles | None
    end_to_end: Percentiles

    @property
    def n(self) -> int:
        """Requests measured."""
        return self.end_to_end.n
