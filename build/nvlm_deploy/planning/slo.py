"""The cheapest profile that answers as fast as asked, or why none does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.planning.plan import Plan

RULE = "least GPUs x list price an hour; then fewer GPUs, then the name"


@dataclass(frozen=True)
class Slo:
    """The most milliseconds that are asked; None asks for nothing."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("TTFT", self.ttft_ms), ("TPOT", self.tpot_ms)):
            if value is not None and not 0 < value < math.inf:
                raise NvlmError(f"{name} of {value:g} ms is no objective", hint="give milliseconds above 0")

    def missed(self, plan: Plan) -> tuple[str, ...]:
        """What a profile does not keep, each in words; empty when it meets all."""
        if not plan.memory.fits:
            return (plan.memory.why_not,)
        if plan.refused_request:
            return (plan.refused_request,)
        if plan.prediction is None:
            return (plan.why_no_prediction or "not estimated",)
        found = {"TTFT": (plan.prediction.ttft_s, self.ttft_ms), "TPOT": (plan.prediction.tpot_s, self.tpot_ms)}
        return tuple(
            f"{name} {1e3 * seconds:.0f} ms, asked {asked:g}"
            for name, (seconds, asked) in found.items()
            if asked is not None and 1e3 * seconds > asked
        )


@dataclass(frozen=True)
class Choice:
    """`cheapest` is None when no profile meets the SLO; `reasons` are then each profile's misses, fewest first."""

    cheapest: Plan | None
    meeting: tuple[Plan, ...]
    reasons: dict[str, tuple[str, ...]]


def choose(plans: Sequence[Plan], slo: Slo, impossible: Mapping[str, str] | None = None) -> Choice:
    """Among plans for the same workload, by RULE; `impossible` profiles have no plan, but a reason."""
    misses = {plan.profile.name: slo.missed(plan) for plan in plans}
    misses |= {name: (reason,) for name, reason in (impossible or {}).items()}
    meeting = sorted((plan for plan in plans if not misses[plan.profile.name]), key=_cost)
    near = sorted(misses, key=lambda name: (len(misses[name]), name))
    return Choice(
        meeting[0] if meeting else None, tuple(meeting), {name: misses[name] for name in near if misses[name]}
    )


def _cost(plan: Plan) -> tuple[float, int, str]:
    price = plan.price_usd_per_hour
    return (float("inf") if price is None else price, plan.gpus, plan.profile.name)
