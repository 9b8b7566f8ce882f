"""`nvlm doctor`: can this machine, or this container, do what is wanted of it? Exit code 1 when it cannot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from nvlm_deploy.cli.lines import wrapped
from nvlm_deploy.cli.options import JsonOption

if TYPE_CHECKING:
    from nvlm_deploy.doctor.needs import Needs
    from nvlm_deploy.llm.preflight import Finding, Preflight


def register(app: typer.Typer) -> None:
    app.command(name="doctor")(doctor)


def doctor(
    profile: Annotated[
        str | None, typer.Option("--profile", "-p", help="What this profile needs: its name, or the path of its .toml.")
    ] = None,
    repository: Annotated[Path | None, typer.Option(help="What this assembled repository needs to be served.")] = None,
    container: Annotated[
        bool, typer.Option("--container", help="Look at the Triton and TensorRT-LLM container this runs in.")
    ] = False,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="With --profile: the model (else NVLM-D-72B). With --container: ask about this TensorRT-LLM "
            "checkpoint (what `nvlm quantize-llm` made), not about all."
        ),
    ] = None,
    workspace: Annotated[Path, typer.Option(help="Folder that a build would fill.")] = Path(),
    grpc_port: Annotated[int, typer.Option(min=1, max=65535)] = 8001,
    http_port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    metrics_port: Annotated[int, typer.Option(min=1, max=65535)] = 8002,
    host: Annotated[str, typer.Option(help="Address that a server would listen on.")] = "127.0.0.1",
    json_output: JsonOption = False,
) -> None:
    """What this machine can and cannot do: one line for each thing looked at, and the fix for each that is wrong.

    Driver, GPUs, MIG, memory, NVLink, libpython, glibc, versions, ports, shared memory and disk, against what a profile
    or a repository needs. With --container: versions, the flags of trtllm-build, and whether TensorRT-LLM reads our
    config.json and wants the tensors that we write. Builds nothing; run it first in a container that is new to you.
    Exit code 1 when something is wrong.
    """
    from nvlm_deploy.errors import NvlmError

    if sum((profile is not None, repository is not None, container)) > 1:
        raise NvlmError("more than one question", hint="give one of --profile, --repository, --container")
    if checkpoint is not None and profile is None and not container:
        raise NvlmError("--checkpoint goes with --profile or --container")
    if container:
        report = _preflight(checkpoint)
        _show(report.findings, report.as_json(), "engines can be built here", json_output=json_output)
        raise typer.Exit(0 if report.passed else 1)
    from nvlm_deploy.doctor.examination import examination
    from nvlm_deploy.doctor.host import Place
    from nvlm_deploy.triton.server import Ports

    place = Place(workspace, Ports(grpc_port, http_port, metrics_port, host))
    found = examination(_needs(profile, repository, checkpoint), place)
    what = profile or repository
    right_ones = f"profiles for this machine: {', '.join(found.profiles)}"
    good = f"{what} can run here" if what else right_ones
    if repository is not None:
        good += f"; whether it is what was built, `nvlm verify {repository}` says"
    _show(found.findings, found.as_json(), good, json_output=json_output)
    if what and not found.passed and not json_output:
        print(wrapped(right_ones, first=0, rest=2))
    raise typer.Exit(0 if found.passed else 1)


def _needs(profile: str | None, repository: Path | None, checkpoint: Path | None) -> Needs | None:
    from nvlm_deploy.doctor.needs import needs_of_profile, needs_of_repository
    from nvlm_deploy.profile import load_profile

    if repository is not None:
        return needs_of_repository(repository)
    return None if profile is None else needs_of_profile(load_profile(profile), checkpoint)


def _preflight(checkpoint: Path | None) -> Preflight:
    from nvlm_deploy.llm.preflight import preflight, standard_layouts

    if checkpoint is None:
        return preflight(standard_layouts())
    from nvlm_deploy.checkpoint.trtllm import read_checkpoint

    return preflight({str(checkpoint): read_checkpoint(checkpoint).layout})


def _show(findings: Sequence[Finding], document: object, good: str, *, json_output: bool) -> None:
    if json_output:
        print(json.dumps(document, indent=2))
        return
    console = Console(highlight=False, soft_wrap=True, emoji=False)
    fixed_by: dict[str, str] = {}
    for finding in findings:
        console.print("ok  " if finding.passed else "NO  ", style="green" if finding.passed else "bold red", end="")
        console.print(wrapped(f"{finding.check}: {finding.found}", first=4, rest=4), markup=False)
        if finding.fix:
            first = fixed_by.setdefault(finding.fix, finding.check)
            fix = finding.fix if first == finding.check else f"the same as for {first}"
            console.print(f"    fix: {wrapped(fix, first=9, rest=9)}", markup=False)
    wrong = sum(not finding.passed for finding in findings)
    last = f"{len(findings)} things looked at, {wrong} wrong" if wrong else good
    console.print(wrapped(last, first=0, rest=2), markup=False)
