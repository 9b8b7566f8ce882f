"""`nvlm plan`: what a profile needs and gives, before anything is downloaded or built. Exit code 1 when it is no."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from nvlm_deploy.cli.options import JsonOption

if TYPE_CHECKING:
    from nvlm_deploy.planning.known_models import PlannedModel
    from nvlm_deploy.planning.plan import Plan
    from nvlm_deploy.planning.serving import Workload
    from nvlm_deploy.planning.slo import Choice, Slo

# of any count that is asked about: more is a slip of the finger
MOST = 1_000_000_000

CheckpointOrNone = Annotated[
    Path | None, typer.Argument(help="Folder with config.json; the index is read where it is, shards need not be.")
]
SpecOption = Annotated[str | None, typer.Option("--spec", help="A built-in spec instead of a folder: nvlm-d-72b.")]


def register(app: typer.Typer) -> None:
    app.command(name="plan")(plan)


def plan(
    checkpoint: CheckpointOrNone = None,
    spec: SpecOption = None,
    profile: Annotated[
        str | None,
        typer.Option("--profile", "-p", help="A profile's name or .toml file; else the cheapest that meets the SLO."),
    ] = None,
    images: Annotated[
        int, typer.Option(min=0, max=MOST, help="Images of a request, each of as many tiles as it may be.")
    ] = 1,
    input_tokens: Annotated[
        int, typer.Option(min=1, max=MOST, help="Tokens of a request's text; images add theirs.")
    ] = 64,
    output_tokens: Annotated[int, typer.Option(min=1, max=MOST, help="Tokens of an answer.")] = 128,
    concurrency: Annotated[int, typer.Option(min=1, max=MOST, help="Requests at the same time.")] = 1,
    host_cores: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="CPU cores of the machine that builds; else this machine's.")
    ] = None,
    disk_gb_s: Annotated[float, typer.Option(min=0.001, max=1000.0, help="GB/s that its disk reads or writes.")] = 1.0,
    ttft_ms: Annotated[float | None, typer.Option(help="SLO: most milliseconds to the first token.")] = None,
    tpot_ms: Annotated[float | None, typer.Option(help="SLO: most milliseconds per further token.")] = None,
    json_output: JsonOption = False,
) -> None:
    """Memory, disk, host RAM, steps and latency of a profile by arithmetic; each number says where it comes from.

    Needs no GPU, no shards and no torch. With an SLO it names the cheapest profile that meets it, or why none does.
    Exit code 1 when the profile does not fit, would refuse such a request or does not meet the SLO.
    """
    from nvlm_deploy.planning.build_steps import Host
    from nvlm_deploy.planning.known_models import planned_model
    from nvlm_deploy.planning.serving import Workload
    from nvlm_deploy.planning.slo import Slo
    from nvlm_deploy.report.planning import print_choice, print_plan
    from nvlm_deploy.report.planning_json import choice_as_json, plan_as_json

    model, host = planned_model(checkpoint, spec), Host(host_cores or os.cpu_count() or 1, 1e9 * disk_gb_s)
    workload, slo = Workload(images, input_tokens, output_tokens, concurrency), Slo(ttft_ms, tpot_ms)
    choice = _choice(model, workload, slo) if slo != Slo() else None
    found = _plan(model, workload, profile, choice)
    found = replace(found, host=host) if found else None
    if json_output:
        document = plan_as_json(found) if found else {}
        print(json.dumps(document | ({"slo": choice_as_json(choice)} if choice else {}), indent=2))
    else:
        console = Console(emoji=False)
        if found:
            print_plan(console, found)
        if choice:
            print_choice(console, choice)
    raise typer.Exit(0 if found and found.serves and not (choice and slo.missed(found)) else 1)


def _choice(model: PlannedModel, workload: Workload, slo: Slo) -> Choice:
    """Among all shipped profiles; those that cannot be at all miss it for that reason."""
    from nvlm_deploy.machine.resources import this_machine
    from nvlm_deploy.planning.listing import judged
    from nvlm_deploy.planning.slo import choose
    from nvlm_deploy.profile import load_profile, profile_names

    machine = this_machine()
    rows = [judged(model, load_profile(name), machine, workload) for name in profile_names()]
    impossible = {row.name: row.reason for row in rows if row.plan is None}
    return choose([row.plan for row in rows if row.plan is not None], slo, impossible)


def _plan(model: PlannedModel, workload: Workload, profile: str | None, choice: Choice | None) -> Plan | None:
    """Of the profile, or of the cheapest; None when no profile was named and none meets the SLO."""
    from nvlm_deploy.errors import NvlmError
    from nvlm_deploy.machine.resources import available_memory
    from nvlm_deploy.planning.plan import make_plan
    from nvlm_deploy.profile import load_profile, profile_names

    if profile is not None:
        return make_plan(model, load_profile(profile), available_memory(), workload)
    if choice is None:
        names = ", ".join(profile_names())
        raise NvlmError("no --profile", hint=f"there are: {names}; or ask for --ttft-ms, --tpot-ms")
    return choice.cheapest
