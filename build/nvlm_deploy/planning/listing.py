"""All profiles against one model and this machine: runnable here, fitting elsewhere, impossible, and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.machine.resources import Gpu, Machine
from nvlm_deploy.planning.known_models import PlannedModel
from nvlm_deploy.planning.memory import GIB
from nvlm_deploy.planning.plan import Plan, legal_splits, make_plan
from nvlm_deploy.planning.serving import Workload
from nvlm_deploy.profile import Profile, load_profile, profile_names
from nvlm_deploy.sku import REFERENCE, load_sku, sku_names

RUNNABLE, ELSEWHERE, IMPOSSIBLE = "runnable here", "fits elsewhere", "impossible"
VERDICTS = (RUNNABLE, ELSEWHERE, IMPOSSIBLE)


@dataclass(frozen=True)
class Listed:
    """One profile and the verdict; `plan` is None where the profile cannot be at all."""

    name: str
    verdict: str
    reason: str
    gpus: int
    sku: str
    plan: Plan | None = None


def sku_of_machine(machine: Machine) -> str | None:
    """The SKU of this machine's first GPU: `cpu` without any, None when it is of a kind we state no facts of."""
    if not machine.gpus:
        return "cpu"
    return next((name for name in sku_names() if _is_of(machine.gpus[0], name)), None)


def usable_gpus(machine: Machine, sku: str) -> int:
    """How many GPUs of a SKU a program gets that takes them from the first on, up to one of another kind."""
    return sum(1 for _ in takewhile(lambda gpu: _is_of(gpu, sku), machine.gpus))


def _is_of(gpu: Gpu, sku: str) -> bool:
    return load_sku(sku).is_gpu(gpu.name, gpu.compute_capability)


def list_profiles(model: PlannedModel, machine: Machine) -> list[Listed]:
    """Every shipped profile, and for each SKU the largest number of GPUs that is still too small; best verdict first.

    Within a verdict by GPUs, then name.
    """
    profiles = [load_profile(name) for name in profile_names()]
    listed = [judged(model, profile, machine) for profile in profiles]
    listed += [row for profile in _fewest_gpus(listed, profiles) for row in _with_too_few(model, profile, machine)]
    return sorted(listed, key=lambda row: (VERDICTS.index(row.verdict), row.gpus, row.name))


def judged(model: PlannedModel, profile: Profile, machine: Machine, workload: Workload | None = None) -> Listed:
    """One profile's verdict for this machine."""
    gpus = profile.decoder.tensor_parallel * profile.decoder.pipeline_parallel
    try:
        plan = make_plan(model, profile, machine.available_bytes, workload)
    except NvlmError as problem:
        return Listed(profile.name, IMPOSSIBLE, problem.message, gpus, profile.sku)
    if not plan.memory.fits:
        verdict = ELSEWHERE if plan.gpus == 0 else IMPOSSIBLE
        return Listed(profile.name, verdict, plan.memory.why_not, plan.gpus, profile.sku, plan)
    if plan.gpus == 0 or usable_gpus(machine, profile.sku) >= plan.gpus:
        return Listed(profile.name, RUNNABLE, _room_words(plan), plan.gpus, profile.sku, plan)
    return Listed(profile.name, ELSEWHERE, _room_words(plan), plan.gpus, profile.sku, plan)


def _room_words(plan: Plan) -> str:
    gpu = plan.memory.tightest
    used, visible = plan.memory.used_bytes(gpu) / GIB, gpu.visible_bytes / GIB
    room = f"{used:.1f} of {visible:.1f} GiB, {plan.memory.kv_tokens:,} KV tokens"
    return room if plan.warning is None else f"{room}; {plan.warning}"


def _fewest_gpus(listed: list[Listed], profiles: list[Profile]) -> Iterator[Profile]:
    """Of each SKU the fitting profile on the fewest GPUs."""
    by_name = {profile.name: profile for profile in profiles}
    for sku in sorted({row.sku for row in listed if row.gpus}):
        rows = [row for row in listed if row.sku == sku and row.plan is not None and row.plan.memory.fits]
        if rows:
            yield by_name[min(rows, key=lambda row: (row.gpus, row.name)).name]


def _with_too_few(model: PlannedModel, profile: Profile, machine: Machine) -> Iterator[Listed]:
    """The same profile on fewer GPUs, the most of them that do not suffice."""
    decoder = profile.decoder
    if decoder.runtime == REFERENCE:
        return
    for tensor, pipeline in reversed(legal_splits(model.spec, decoder.tensor_parallel - 1)):
        if pipeline == 1:
            fewer = decoder.model_copy(update={"tensor_parallel": tensor, "pipeline_parallel": 1})
            name = f"{profile.name} on {tensor}"
            row = judged(model, profile.model_copy(update={"name": name, "decoder": fewer}), machine)
            if row.verdict == IMPOSSIBLE:
                yield row
                return
