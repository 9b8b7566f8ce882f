"""`nvlm build` and its single steps: checkpoint to assembled Triton repository."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import typer
from rich.console import Console

from nvlm_deploy.cli.options import (
    CalibrationOption,
    CheckpointArgument,
    DryRunOption,
    ForceOption,
    JsonOption,
    ProfileOption,
    WorkspaceOption,
)
from nvlm_deploy.recipe import Recipe
from nvlm_deploy.report.progress import BytesProgress
from nvlm_deploy.steps.decoder import engine_commands
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


def _verb(only: str | None = None) -> Callable[..., None]:
    """The command that runs one step, or all of them; typer reads the inner function's signature."""

    def run(
        checkpoint: CheckpointArgument,
        profile: ProfileOption = "cpu",
        workspace: WorkspaceOption = Path(),
        calibration: CalibrationOption = None,
        force: ForceOption = False,
        dry_run: DryRunOption = False,
        json_output: JsonOption = False,
    ) -> None:
        from nvlm_deploy.profile import load_profile

        with contextlib.closing(BytesProgress()) as progress:
            recipe = Recipe(checkpoint, load_profile(profile), workspace, calibration, progress)
            _execute(Request(recipe, force, only), dry_run=dry_run, json_output=json_output)

    return run


def _execute(request: Request, *, dry_run: bool, json_output: bool) -> None:
    console = Console(stderr=True, highlight=False)
    rows: list[dict[str, str | float]] = []
    started = time.monotonic()
    pipeline = pipeline_of(request.recipe, request.only, dry_run=dry_run)
    if dry_run:
        rows = [{"step": name, "state": str(state)} for name, state in pipeline.plan(force=request.force)]
    else:
        for step, state in pipeline.run(force=request.force):
            seconds = time.monotonic() - started
            rows.append({"step": step.name, "state": str(state), "output": str(step.output), "seconds": seconds})
            console.print(f"{step.name:14} {state:12} {seconds:7.1f} s  {step.output}")
            started = time.monotonic()
    report: dict[str, object] = {"profile": request.recipe.profile.name, "dry_run": dry_run, "steps": rows}
    if dry_run and "build-llm" in pipeline.makers:
        report["commands"] = engine_commands(request.recipe)
    if json_output:
        print(json.dumps(report))
    elif dry_run:
        for row in rows:
            print(f"{row['step']:14} {row['state']}")
        if "commands" in report:
            print(report["commands"])
    else:
        print(rows[-1]["output"])
