"""`nvlm build` and its single steps: checkpoint to assembled Triton repository."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import typer
from rich.console import Console

from nvlm_deploy.cli.options import (
    CalibrationOption,
    CheckpointArgument,
    ContainerImageOption,
    DryRunOption,
    ForceOption,
    JsonOption,
    ProfileOption,
    WorkspaceOption,
)
from nvlm_deploy.llm.engine_tool import CONTAINER_IMAGE
from nvlm_deploy.recipe import Recipe
from nvlm_deploy.report.progress import BytesProgress
from nvlm_deploy.steps.dry_run import Surroundings, dry_run_of
from nvlm_deploy.steps.order import STEPS, pipeline_of

HELP = {
    "export-vision": "Vision encoder and projector to ONNX: weights streamed, read back, resumable.",
    "build-vision": "Numerics gate, then the engine of the profile's vision runtime.",
    "calibrate-llm": "What the samples, pictures among them, do to every layer of the decoder; resumable.",
    "quantize-llm": "Decoder to a TensorRT-LLM checkpoint for any split, FP8 scales from one calibration; resumable.",
    "export-hf": "The whole model as a Hugging Face folder with its decoder in FP8 or BF16, as vLLM reads it.",
    "build-llm": "One engine per rank by trtllm-build, inside its container; --dry-run prints the commands.",
    "assemble": "Triton model repository from built artifacts; every config re-parsed and cross-checked.",
}


def register(app: typer.Typer) -> None:
    app.command(name="build", help="All steps from a checkpoint to a Triton repository; finished ones are kept.")(
        _verb()
    )
    for step in STEPS:
        app.command(name=step, help=HELP[step])(_verb(only=step))


@dataclass(frozen=True)
class Request:
    """What one build command asks for."""

    recipe: Recipe
    force: bool
    only: str | None = None
    surroundings: Surroundings = field(default_factory=Surroundings)


def _verb(only: str | None = None) -> Callable[..., None]:
    """The command that runs one step, or all of them; typer reads the inner function's signature."""

    def run(
        checkpoint: CheckpointArgument,
        profile: ProfileOption = "cpu",
        workspace: WorkspaceOption = Path(),
        calibration: CalibrationOption = None,
        force: ForceOption = False,
        dry_run: DryRunOption = False,
        container_image: ContainerImageOption = CONTAINER_IMAGE,
        json_output: JsonOption = False,
    ) -> None:
        from nvlm_deploy.profile import load_profile

        surroundings = Surroundings(Path(profile) if profile.endswith(".toml") else None, container_image)

        with contextlib.closing(BytesProgress()) as progress:
            recipe = Recipe(checkpoint, load_profile(profile), workspace, calibration, progress)
            request = Request(recipe, force, only, surroundings)
            _plan(request, json_output=json_output) if dry_run else _execute(request, json_output=json_output)

    return run


def _plan(request: Request, *, json_output: bool) -> None:
    pipeline = pipeline_of(request.recipe, request.only, dry_run=True)
    found = dry_run_of(request.recipe, pipeline, request.surroundings, force=request.force)
    if json_output:
        print(json.dumps(found.as_json()))
    else:
        print("\n".join(found.lines))


def _execute(request: Request, *, json_output: bool) -> None:
    console = Console(stderr=True, highlight=False)
    rows: list[dict[str, str | float]] = []
    started = time.monotonic()
    for step, state in pipeline_of(request.recipe, request.only).run(force=request.force):
        seconds = time.monotonic() - started
        rows.append({"step": step.name, "state": str(state), "output": str(step.output), "seconds": seconds})
        console.print(f"{step.name:14} {state:12} {seconds:7.1f} s  {step.output}")
        started = time.monotonic()
    if json_output:
        print(json.dumps({"profile": request.recipe.profile.name, "dry_run": False, "steps": rows}))
    else:
        print(rows[-1]["output"])
