"""Plans and lists of profiles: text 80 columns wide for people, and the same numbers for programs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from nvlm_deploy.llm.engine_machine import Machine
from nvlm_deploy.planning.listing import RUNNABLE, VERDICTS, Listed, sku_of_machine
from nvlm_deploy.planning.memory import GIB, GpuAccount, kv_bytes_per_token
from nvlm_deploy.planning.plan import Plan, legal_splits
from nvlm_deploy.planning.roofline import EFFICIENCY
from nvlm_deploy.planning.serving import Prediction
from nvlm_deploy.planning.slo import RULE, Choice
from nvlm_deploy.planning.weights import layout_of, whole_decoder_bytes

# median absolute error over the published rows that the constants were not fitted to (tests/bench/bench_predictions.py)
TESTED_ERROR = "11 %"
STAGE_EVIDENCE = {"preprocess": "measured"}
_MOST_COLUMNS = 4


def print_plan(console: Console, plan: Plan) -> None:
    """All of a plan, section by section."""
    _print_facts(console, plan)
    console.print(_memory_table(plan))
    hidden = len(plan.memory.gpus) - sum(len(group) for group in _shown(plan))
    if hidden:
        _line(console, f"  {hidden} GPUs that use less are not shown; --json has all")
    _print_cache(console, plan)
    console.print(_steps_table(plan))
    _print_service(console, plan)


def print_choice(console: Console, choice: Choice) -> None:
    """The cheapest profile under an SLO, or each profile's reason why not."""
    _line(console, "")
    if choice.cheapest is not None:
        _line(
            console, f"SLO: cheapest profile that meets it: {choice.cheapest.profile.name}, {_price(choice.cheapest)}"
        )
        others = [f"{plan.profile.name} {_price(plan)}" for plan in choice.meeting[1:4]]
        if others:
            _line(console, f"     next: {'; '.join(others)}")
        _line(console, f"     rule: {RULE}")
        return
    _line(console, "SLO: no profile meets it:")
    for name, reasons in choice.reasons.items():
        _line(console, f"     {name}: {'; '.join(reasons)}")


def print_profiles(console: Console, listed: Sequence[Listed], machine: Machine, model_name: str) -> None:
    """This machine, then the profiles by verdict."""
    _line(console, f"this system: {system_sentence(machine)}")
    for verdict in VERDICTS:
        rows = [row for row in listed if row.verdict == verdict]
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=f"{verdict} with {model_name}", title_justify="left")
        table.add_column("profile", overflow="fold")
        table.add_column("GPUs", justify="right")
        table.add_column("memory of the fullest GPU" if verdict == RUNNABLE else "why", overflow="fold")
        for row in rows:
            table.add_row(row.name, str(row.gpus), row.reason)
        if rows:
            console.print(table)
        else:
            _line(console, f"{verdict} with {model_name}: none")


def system_sentence(machine: Machine) -> str:
    """As `2 x NVIDIA H200 (SKU h200-141gb), 901.2 GiB of host memory free`."""
    host = f"{machine.available_bytes / GIB:.1f} GiB of host memory free"
    if not machine.gpus:
        return f"no GPU, {host}"
    known = sku_of_machine(machine)
    sku = f"SKU {known}" if known else "no SKU of ours"
    return f"{len(machine.gpus)} x {machine.gpus[0].name} ({sku}), {host}"


def plan_as_json(plan: Plan, choice: Choice | None = None) -> dict[str, Any]:
    """Every number of the plan; bytes, seconds and tokens unrounded, each group with its evidence."""
    memory = plan.memory
    document: dict[str, Any] = {
        "model": _model_as_json(plan),
        "profile": plan.profile.name,
        "sku": plan.sku.name,
        "gpus": plan.gpus,
        "price_usd_per_hour": plan.price_usd_per_hour,
        "fits": memory.fits,
        "why_not": None if memory.fits else memory.why_not,
        "legal_splits": [list(split) for split in legal_splits(plan.model.spec, plan.sku.gpus_per_server or 1)],
        "memory": [_gpu_as_json(plan, gpu) for gpu in memory.gpus],
        "kv_cache": {
            "bytes_per_token": memory.kv_bytes_per_token,
            "tokens": memory.kv_tokens,
            "requests_of_max_seq_len": memory.requests(plan.profile.decoder.max_seq_len),
            "requests_of_workload": plan.requests,
            "evidence": "derived",
        },
        "steps": [asdict(step) for step in plan.steps],
        "workload": {**asdict(plan.workload), "prompt_tokens": plan.workload.prompt_tokens(plan.model.spec)},
        "refused_request": plan.refused_request,
        "prediction": _prediction_as_json(plan),
    }
    if choice is not None:
        document["slo"] = {
            "cheapest": None if choice.cheapest is None else choice.cheapest.profile.name,
            "meeting": [other.profile.name for other in choice.meeting],
            "missed": {name: list(reasons) for name, reasons in choice.reasons.items()},
            "rule": RULE,
        }
    return document


def profiles_as_json(listed: Sequence[Listed], machine: Machine, model_name: str) -> dict[str, Any]:
    return {
        "system": {
            "gpus": [asdict(gpu) for gpu in machine.gpus],
            "sku": sku_of_machine(machine),
            "available_bytes": machine.available_bytes,
        },
        "model": model_name,
        "profiles": [_listed_as_json(row) for row in listed],
    }


def _listed_as_json(row: Listed) -> dict[str, Any]:
    numbers: dict[str, Any] = {}
    if row.plan is not None:
        gpu = row.plan.memory.tightest
        numbers = {
            "needed_bytes": row.plan.memory.needed_bytes(gpu),
            "visible_bytes": gpu.visible_bytes,
            "kv_tokens": row.plan.memory.kv_tokens,
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


def _print_facts(console: Console, plan: Plan) -> None:
    model, memory = plan.model, plan.memory
    verdict = "fits" if memory.fits else f"DOES NOT FIT: {memory.why_not}"
    gpus = f"{plan.gpus} x {plan.sku.description}" if plan.gpus else plan.sku.description
    _line(console, f"{model.name} with {plan.profile.name}: {verdict}")
    _line(console, f"  on      {gpus}, {_price(plan)}")
    size = f"{model.parameters / 1e9:.2f} B parameters, {model.checkpoint_bytes / GIB:.1f} GiB in BF16"
    _line(console, f"  model   {size} ({model.evidence})")
    weights = whole_decoder_bytes(layout_of(model.spec, plan.profile))
    kind = "BF16" if plan.profile.decoder.quantization == "none" else "FP8"
    parts = f"{weights.linears / GIB:.2f} GiB of linears in {kind} + {weights.others / GIB:.2f} GiB in BF16"
    _line(console, f"  decoder {parts} (derived)")
    if plan.gpus and plan.sku.gpus_per_server:
        splits = legal_splits(model.spec, plan.sku.gpus_per_server)
        words = " ".join(f"{tensor}x{pipeline}" for tensor, pipeline in splits)
        _line(console, f"  splits  legal on up to {plan.sku.gpus_per_server} GPUs, tensor x pipeline (derived):")
        _line(console, f"          {words}")


def _memory_table(plan: Plan) -> Table:
    memory = plan.memory
    groups = _shown(plan)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("GiB of memory", overflow="fold")
    for group in groups:
        table.add_column(_group_name(group, memory.room.place), justify="right")
    table.add_column("origin")
    for name in dict.fromkeys(line.name for group in groups for line in group[0].lines):
        lines = [next((line for line in group[0].lines if line.name == name), None) for group in groups]
        evidence = next(line.evidence for line in lines if line is not None)
        table.add_row(name, *("-" if line is None else _gib(line.size_bytes) for line in lines), evidence)
    table.add_row("KV cache", *(_gib(memory.kv_bytes(group[0])) for group in groups), "derived")
    table.add_section()
    table.add_row("in use", *(_gib(memory.used_bytes(group[0])) for group in groups), "derived")
    table.add_row("visible", *(_gib(group[0].visible_bytes) for group in groups), memory.room.evidence)
    return table


def _shown(plan: Plan) -> list[list[GpuAccount]]:
    """The fullest kinds of rank, as many as there are columns for, by rank."""
    groups = _alike(plan.memory.gpus)
    fullest = sorted(groups, key=lambda group: -plan.memory.used_bytes(group[0]))[:_MOST_COLUMNS]
    return sorted(fullest, key=lambda group: group[0].rank)


def _alike(gpus: Sequence[GpuAccount]) -> list[list[GpuAccount]]:
    """Runs of ranks with the same account."""
    return [list(group) for _, group in groupby(gpus, key=lambda gpu: (gpu.lines, gpu.kv_bytes_per_token))]


def _group_name(group: Sequence[GpuAccount], place: str) -> str:
    if place != "GPU":
        return place
    first, last = group[0].rank, group[-1].rank
    return f"GPU {first}" if first == last else f"GPU {first}-{last}"


def _print_cache(console: Console, plan: Plan) -> None:
    memory, longest = plan.memory, plan.profile.decoder.max_seq_len
    total = memory.kv_tokens * memory.kv_bytes_per_token
    spec = plan.model.spec.decoder
    sizes = (
        f"{kv_bytes_per_token(spec, '16bit'):,} bytes a token in 16 bits, {kv_bytes_per_token(spec, 'fp8'):,} in FP8"
    )
    _line(console, f"KV cache: {sizes} (derived)")
    chosen = plan.profile.decoder.kv_cache
    _line(console, f"  {memory.kv_tokens:,} tokens, {_gib(total)} GiB on all GPUs, {chosen} (derived)")
    of_workload = f"{plan.requests} like the one below" if plan.refused_request is None else "none like the one below"
    _line(
        console, f"  holds {memory.requests(longest)} requests of {longest:,} tokens at once, {of_workload} (derived)"
    )


def _steps_table(plan: Plan) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("step")
    for name in ("host RAM, GiB", "disk, GiB", "minutes"):
        table.add_column(name, justify="right")
    table.add_column("time is (derived, disk at 1 GB/s)", overflow="fold")
    for step in plan.steps:
        minutes = "?" if step.seconds is None else f"{step.seconds / 60:.0f}" if step.seconds >= 60 else "< 1"
        mark = " m" if step.host_evidence == "measured" else ""
        table.add_row(step.name, f"{step.host_bytes / GIB:.1f}{mark}", _gib(step.disk_bytes, 1), minutes, step.how)
    table.add_section()
    disk = sum(step.disk_bytes for step in plan.steps)
    table.add_row("all", f"{max(step.host_bytes for step in plan.steps) / GIB:.1f}", _gib(disk, 1), "", "m: measured")
    return table


def _print_service(console: Console, plan: Plan) -> None:
    for line in _service_lines(plan):
        _line(console, line)


def _service_lines(plan: Plan) -> Iterator[str]:
    workload, spec = plan.workload, plan.model.spec
    tokens = workload.prompt_tokens(spec)
    images = f"{workload.images} image(s) of {spec.tiling.max_tiles_with_thumbnail} tiles"
    sizes = f"{workload.input_tokens} tokens of text, {workload.output_tokens} out"
    yield f"request: {images}, {sizes}, {workload.concurrency} at once"
    yield f"  prompt of {tokens:,} tokens (derived)"
    if plan.refused_request:
        yield f"  would be refused: {plan.refused_request}"
    elif plan.prediction is None:
        yield f"  not estimated: {plan.why_no_prediction or 'it does not fit'}"
    else:
        yield from _prediction_lines(plan.prediction)


def _prediction_lines(found: Prediction) -> Iterator[str]:
    yield f"  TTFT {1e3 * found.ttft_s:7.1f} ms (derived) ="
    for name, seconds in found.stages.items():
        yield f"       {1e3 * seconds:7.1f} {name} ({STAGE_EVIDENCE.get(name, 'derived')})"
    yield f"  TPOT {1e3 * found.tpot_s:7.1f} ms (derived)"
    yield f"       {found.tokens_per_s:7.1f} tokens/s with {found.running} running (derived)"
    share = EFFICIENCY
    peaks = f"{share.fp8:.0%} of FP8 and {share.sixteen_bit:.0%} of 16-bit peak"
    yield f"  at {share.bandwidth:.0%} of bandwidth, {peaks} (fitted),"
    yield f"  {share.vision:.0%} of it in the encoder (assumed); median error on rows not fitted to: {TESTED_ERROR}"


def _price(plan: Plan) -> str:
    price = plan.price_usd_per_hour
    return "no price" if price is None else f"${price:.2f} an hour (published)"


def _gib(size_bytes: int, digits: int = 2) -> str:
    return f"{size_bytes / GIB:.{digits}f}"


def _line(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False)
