"""`nvlm profiles`: every profile against a model and this machine, with the reason for each that cannot run."""

from __future__ import annotations

import json

import typer
from rich.console import Console

from nvlm_deploy.cli.options import JsonOption
from nvlm_deploy.cli.plan import CheckpointOrNone, SpecOption


def register(app: typer.Typer) -> None:
    app.command(name="profiles")(profiles)


def profiles(checkpoint: CheckpointOrNone = None, spec: SpecOption = None, json_output: JsonOption = False) -> None:
    """This system, then profiles runnable on it, those fitting elsewhere, and the impossible ones with the reason.

    Without a checkpoint for the released model, nvlm-d-72b.
    """
    from nvlm_deploy.machine.resources import this_machine
    from nvlm_deploy.planning.known_models import DEFAULT_SPEC, planned_model
    from nvlm_deploy.planning.listing import list_profiles
    from nvlm_deploy.report.planning import print_profiles
    from nvlm_deploy.report.planning_json import profiles_as_json

    model = planned_model(checkpoint, DEFAULT_SPEC if checkpoint is None and spec is None else spec)
    machine = this_machine()
    listed = list_profiles(model, machine)
    if json_output:
        print(json.dumps(profiles_as_json(listed, machine, model.name), indent=2))
    else:
        print_profiles(Console(emoji=False), listed, machine, model.name)
