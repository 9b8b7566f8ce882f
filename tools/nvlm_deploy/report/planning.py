"""Plans and lists of profiles for people: text as wide as the terminal. For programs: planning_json.py."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby

from rich import box
from rich.console import Console
from rich.table import Table

from nvlm_deploy.machine.resources import Machine
from nvlm_deploy.planning.build_steps import most_disk_bytes
from nvlm_deploy.planning.listing import RUNNABLE, VERDICTS, Listed, sku_of_machine
from nvlm_deploy.planning.memory import GIB, MIB, GpuAccount, kv_bytes_per_token
from nvlm_deploy.planning.plan import Plan, legal_splits
from nvlm_deploy.planning.roofline import EFFICIENCY, has_nvlink
from nvlm_deploy.planning.serving import Prediction
from nvlm_deploy.planning.slo import RULE, Choice
from nvlm_deploy.planning.weights import layout_of, whole_decoder_bytes
from nvlm_deploy.report.planning_json import STAGE_EVIDENCE, TESTED_ERROR

_MOST_COLUMNS = 4
_LEAST_WIDTH = 20


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
    kinds = Counter(gpu.name for gpu in machine.gpus)
    first, *others = (f"{count} x {name}" for name, count in kinds.items())
    return ", ".join([f"{first} ({sku})", *others, host])


def _print_facts(console: Console, plan: Plan) -> None:
    model, memory = plan.model, plan.memory
    verdict = "fits"
    if not memory.fits:
        verdict = f"DOES NOT FIT: {memory.why_not}"
    elif plan.refused_request:
        verdict = f"fits, WOULD REFUSE this request: {plan.refused_request}"
    gpus = f"{plan.gpus} x {plan.sku.description}" if plan.gpus else plan.sku.description
    _line(console, f"{model.name} with {plan.profile.name}: {verdict}")
    if plan.warning:
        _line(console, f"  warning {plan.warning}")
    _line(console, f"  on      {gpus}, {_price(plan)}")
    size = f"{model.parameters / 1e9:.2f} B parameters, {model.checkpoint_bytes / GIB:.1f} GiB in BF16"
    if model.checkpoint_bytes < GIB:
        size = f"{model.parameters / 1e6:.2f} M parameters, {model.checkpoint_bytes / MIB:.1f} MiB in BF16"
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
    like_below = plan.requests if plan.refused_request is None else "none"
    at_once = f"{memory.requests(longest)} requests of {longest:,} tokens at once, {like_below} like the one below"
    _line(console, f"  holds {at_once} (derived)")
    large, small = plan.servable_images
    tiles = plan.model.spec.tiling.max_tiles_with_thumbnail
    _line(
        console,
        f"  {longest:,} tokens have room for {large:,} images of {tiles} tiles, {small:,} of the smallest (derived)",
    )


def _steps_table(plan: Plan) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("step")
    for name in ("host RAM, GiB", "disk, GiB", "minutes"):
        table.add_column(name, justify="right")
    table.add_column(f"time is (derived, disk at {plan.host.disk_bytes_per_s / 1e9:g} GB/s)", overflow="fold")
    for step in plan.steps:
        minutes = "?" if step.seconds is None else f"{step.seconds / 60:,.0f}" if step.seconds >= 60 else "< 1"
        mark = " m" if step.host_evidence == "measured" else ""
        how = step.how + (f"; {_gib(step.scratch_bytes, 1)} GiB of scratch" if step.scratch_bytes else "")
        table.add_row(step.name, f"{step.host_bytes / GIB:.1f}{mark}", _gib(step.disk_bytes, 1), minutes, how)
    table.add_section()
    disk = most_disk_bytes(plan.steps)
    host = max(step.host_bytes for step in plan.steps)
    table.add_row("at most", f"{host / GIB:.1f}", _gib(disk, 1), "", "with scratch; m: measured, else derived")
    return table


def _print_service(console: Console, plan: Plan) -> None:
    for line in _service_lines(plan):
        _line(console, line)


def _service_lines(plan: Plan) -> Iterator[str]:
    workload, spec = plan.workload, plan.model.spec
    tokens = workload.prompt_tokens(spec)
    images = f"{workload.images:,} image(s) of {spec.tiling.max_tiles_with_thumbnail} tiles"
    sizes = f"{workload.input_tokens:,} tokens of text, {workload.output_tokens:,} out"
    yield f"request: {images}, {sizes}, {workload.concurrency:,} at once"
    yield f"  prompt of {tokens:,} tokens (derived)"
    if plan.refused_request:
        yield f"  would be refused: {plan.refused_request}"
    elif plan.prediction is None:
        yield f"  not estimated: {plan.why_no_prediction or 'it does not fit'}"
    else:
        yield from _prediction_lines(plan.prediction)
        if not has_nvlink(plan.sku, plan.profile.decoder.tensor_parallel):
            yield f"  {EFFICIENCY.pcie:.0%} of PCIe's bandwidth between GPUs (published, of another GPU)"
        if plan.profile.decoder.pipeline_parallel > 1:
            yield "  pipeline stages are counted one after another: at least so many tokens/s"


def _prediction_lines(found: Prediction) -> Iterator[str]:
    yield f"  TTFT {1e3 * found.ttft_s:7.1f} ms (derived) ="
    for name, seconds in found.stages.items():
        yield f"       {1e3 * seconds:7.1f} {name} ({STAGE_EVIDENCE.get(name, 'derived')})"
    yield f"  TPOT {1e3 * found.tpot_s:7.1f} ms (derived)"
    yield f"       {found.tokens_per_s:7.1f} tokens/s with {found.running} running (derived)"
    share = EFFICIENCY
    peaks = f"{share.fp8:.0%} of FP8 and {share.sixteen_bit:.0%} of 16-bit peak"
    yield f"  at {share.bandwidth:.0%} of bandwidth, {peaks} (fitted),"
    yield f"  {share.vision:.0%} of 16-bit peak in the encoder (assumed)"
    yield f"  median error on published rows that were not fitted to: {TESTED_ERROR}"


def _price(plan: Plan) -> str:
    price = plan.price_usd_per_hour
    return "no price" if price is None else f"${price:.2f} an hour (published)"


def _gib(size_bytes: int, digits: int = 2) -> str:
    return f"{size_bytes / GIB:.{digits}f}"


def _line(console: Console, text: str) -> None:
    """What is too long for the terminal goes on below, two columns further in."""
    below = " " * (len(text) - len(text.lstrip()) + 2)
    width = max(console.width, _LEAST_WIDTH)
    lines = textwrap.fill(text, width, subsequent_indent=below, break_on_hyphens=False)
    console.print(lines, markup=False, highlight=False)
