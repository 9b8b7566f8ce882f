"""`nvlm demo`: everything once, with the small model, on this machine."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer
from rich.console import Console, RenderableType

from nvlm_deploy.cli.options import JsonOption

if TYPE_CHECKING:
    from nvlm_deploy.demo import DemoResult
    from nvlm_deploy.pipeline import State, Step
    from nvlm_deploy.samples import Sample

RESULT_NAME = "demo.json"


def register(app: typer.Typer) -> None:
    app.command(name="demo")(demo)


def demo(
    workspace: Annotated[Path, typer.Option(help="Folder for everything the demo makes.")] = Path("engines/demo"),
    questions: Annotated[int | None, typer.Option(min=10, help="Only the first so many held-out questions.")] = None,
    json_output: JsonOption = False,
) -> None:
    """Quantise a small NVLM-D to FP8, serve it with Triton, and measure it beside the unquantised model.

    Takes some minutes on a CPU; a second run keeps what is built. The numbers are also
    written to WORKSPACE/demo.json. Exit code 1 when the bundled picture is misread.
    """
    from nvlm_deploy.artifacts import write_text
    from nvlm_deploy.demo import Assets, Sizes, run_demo
    from nvlm_deploy.report.device import device_name

    started = time.monotonic()
    screen = Screen(sys.stderr if json_output else sys.stdout)
    result = run_demo(Assets.of_checkout(), workspace, screen, Sizes(questions))
    document = {"device": device_name(), "seconds": time.monotonic() - started, **result.as_json()}
    write_text(workspace / RESULT_NAME, json.dumps(document, indent=2) + "\n")
    if json_output:
        print(json.dumps(document))
    else:
        print_result(result)
    raise typer.Exit(0 if result.example.is_right else 1)


class Screen:
    """Shows the demo as it runs: steps on stderr, the streamed answer where the result goes."""

    def __init__(self, answers: TextIO) -> None:
        self.answers = answers
        self.right = ""

    def on_step(self, profile: str, step: Step, state: State) -> None:
        print(f"{profile}: {step.name} {state}", file=sys.stderr)

    def on_example(self, sample: Sample) -> None:
        picture = os.path.relpath(sample.images[0])
        print(f"\n{picture}: {sample.question}\n  FP8 answers: ", file=self.answers, end="", flush=True)
        self.right = sample.answer

    def on_piece(self, piece: str) -> None:
        print(piece, file=self.answers, end="", flush=True)

    def on_example_end(self) -> None:
        print(f"\n  right is:    {self.right}", file=self.answers)


def print_result(result: DemoResult, *more: RenderableType) -> None:
    """The table, the difference in one sentence, and whatever else belongs below."""
    from nvlm_deploy.report.tables import difference_sentence, results_table

    comparison = result.comparison
    sentence = difference_sentence("BF16", "FP8", comparison.differences["all"], comparison.agreement)
    Console(highlight=False).print("", results_table(result.models), sentence, *more, sep="\n")
