"""Plans and lists of profiles for programs: every number unrounded, each group with its evidence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from nvlm_deploy.machine.resources import Machine
from nvlm_deploy.planning.build_steps import most_disk_bytes
from nvlm_deploy.planning.listing import Listed, sku_of_machine
from nvlm_deploy.planning.memory import GpuAccount
from nvlm_deploy.planning.plan import Plan, legal_splits
from nvlm_deploy.planning.roofline import EFFICIENCY
from nvlm_deploy.planning.slo import RULE, Choice
from nvlm_deploy.planning.weights import layout_of, whole_decoder_bytes

# median absolute error over the published rows that the constants were not fitted to (tests/bench/bench_predictions.py)
TESTED_ERROR = "11 %"
STAGE_EVIDENCE = {"preprocess": "measured"}


def plan_as_json(plan: Plan) -> dict[str, Any]:
    """Every number of the plan; bytes, seconds and tokens unrounded, each group with its evidence."""
    memory, (large, small) = plan.memory, plan.servable_images
    return {
        "model": _model_as_json(plan),
        "profile": plan.profile.name,
        "sku": plan.sku.name,
        "gpus": plan.gpus,
        "price_usd_per_hour": plan.price_usd_per_hour,
        "price_evidence": "published",
        "fits": memory.fits,
        "why_not": None if memory.fits else memory.why_not,
        "warning": plan.warning,
        "legal_splits": [list(split) for split in legal_splits(plan.model.spec, plan.sku.gpus_per_server or 1)],
        "memory": [_gpu_as_json(plan, gpu) for gpu in memory.gpus],
        "kv_cache": {
            "bytes_per_token": memory.kv_bytes_per_token,
            "tokens": memory.kv_tokens,
            "requests_of_max_seq_len": memory.requests(plan.profile.decoder.max_seq_len),
            "requests_of_workload": plan.requests,
            "evidence": "derived",
        },
        "host": asdict(plan.host),
        "steps": [{**asdict(step), "disk_evidence": "derived", "seconds_evidence": "derived"} for step in plan.steps],
        "most_disk_bytes": most_disk_bytes(plan.steps),
        "workload": {**asdict(plan.workload), "prompt_tokens": plan.workload.prompt_tokens(plan.model.spec)},
        "images": {
            "max_images": plan.profile.serving.max_images,
            "room_for_largest": large,
            "room_for_smallest": small,
            "evidence": "derived",
        },
        "refused_request": plan.refused_request,
        "prediction": _prediction_as_json(plan),
    }


def choice_as_json(choice: Choice) -> dict[str, Any]:
    return {
        "cheapest": None if choice.cheapest is None else choice.cheapest.profile.name,
        "meeting": [other.profile.name for other in choice.meeting],
        "missed": {name: list(reasons) for name, reasons in choice.reasons.items()},
        "rule": RULE,
    }


def profiles_as_json(listed: Sequence[Listed], machine: Machine, model_name: str) -> dict[str, Any]:
    return {
        "system": {
            "gpus": [asdict(gpu) for gpu in machine.gpus],
            "sku": sku_of_machine(machine),
            "available_bytes": machine.available_bytes,
            "evidence": "measured",
        },
        "model": model_name,
        "profiles": [_listed_as_json(row) for row in listed],
    }


def _listed_as_json(row: Listed) -> dict[str, Any]:
    numbers: dict[str, Any] = {}
    if row.plan is not None:
        gpu = row.plan.memory.tightest
        numbers = {
            "used_bytes": row.plan.memory.used_bytes(gpu),
            "needed_for_one_sequence_bytes": row.plan.memory.needed_bytes(gpu),
            "visible_bytes": gpu.visible_bytes,
            "kv_tokens": row.plan.memory.kv_tokens,
            "evidence": "derived",
        }
    return {"name": row.name, "verdict": row.verdict, "reason": row.reason, "gpus": row.gpus, "sku": row.sku, **numbers}


def _model_as_json(plan: Plan) -> dict[str, Any]:
    model = plan.model
    return {
        "name": model.name,
        "parameters": model.parameters,
        "parameters_by_part": model.parameters_by_part,
        "checkpoint_bytes": model.checkpoint_bytes,
        "decoder_bytes": asdict(whole_decoder_bytes(layout_of(model.spec, plan.profile))),
        "evidence": model.evidence,
    }


def _gpu_as_json(plan: Plan, gpu: GpuAccount) -> dict[str, Any]:
    memory = plan.memory
    return {
        "rank": gpu.rank,
        "place": memory.room.place,
        "lines": [asdict(line) for line in gpu.lines],
        "kv_cache_bytes": memory.kv_bytes(gpu),
        "kv_cache_bytes_per_token": gpu.kv_bytes_per_token,
        "used_bytes": memory.used_bytes(gpu),
        "visible_bytes": gpu.visible_bytes,
        "visible_evidence": memory.room.evidence,
    }


def _prediction_as_json(plan: Plan) -> dict[str, Any] | None:
    found = plan.prediction
    if found is None:
        return None
    return {
        "ttft_s": found.ttft_s,
        "stages_s": {
            name: {"seconds": seconds, "evidence": STAGE_EVIDENCE.get(name, "derived")}
            for name, seconds in found.stages.items()
        },
        "tpot_s": found.tpot_s,
        "tokens_per_s": found.tokens_per_s,
        "running": found.running,
        "evidence": "derived",
        "efficiency": asdict(EFFICIENCY),
        "median_error_on_published_rows": TESTED_ERROR,
    }
