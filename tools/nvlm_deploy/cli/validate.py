"""`nvlm validate`: is a candidate as good as the unquantised model? Exit code 1 when it is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from nvlm_deploy.cli.options import CheckpointArgument, JsonOption, ProfileOption, WorkspaceOption
from nvlm_deploy.cli.verbs import Verbs

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nvlm_deploy.report.measurement import IntervalVerdict
    from nvlm_deploy.validate.tasks import Comparison
    from nvlm_deploy.vision.numerics.report import NumericsReport

group = typer.Typer(cls=Verbs, help="Compare a candidate with its reference.")


def register(app: typer.Typer) -> None:
    app.add_typer(group, name="validate")


@group.command()
def accuracy(
    checkpoint: CheckpointArgument,
    samples: Annotated[Path, typer.Option(help="Folder with samples.jsonl: questions, answers, images.")],
    profile: ProfileOption = "cpu",
    workspace: WorkspaceOption = Path(),
    url: Annotated[str | None, typer.Option(help="Ask the candidate at this server (HOST:PORT, gRPC).")] = None,
    reference_url: Annotated[str | None, typer.Option(help="Ask the reference at this server.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many samples.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 32,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time to a server.")] = 8,
    max_drop: Annotated[float, typer.Option(help="Accuracy that may be lost, in percentage points.")] = 1.0,
    json_output: JsonOption = False,
) -> None:
    """Right answers of the built model against the unquantised checkpoint's, on the same questions.

    Without URLs both run in this process: the checkpoint as it is, and what `nvlm build` made in the workspace.
    Exit code 0 when the whole 95 % interval of the loss is within --max-drop, 1 when it is beyond it, and 1 with the
    verdict "undecided" when so few questions show neither.
    """
    from nvlm_deploy.places import require_folder
    from nvlm_deploy.profile import load_profile
    from nvlm_deploy.recipe import Recipe
    from nvlm_deploy.samples import read_samples
    from nvlm_deploy.validate.accuracy import Questions, drop_verdict
    from nvlm_deploy.validate.in_process import built_model, reference_model
    from nvlm_deploy.validate.tasks import Comparison

    questions = Questions(read_samples(samples, limit=limit), max_tokens, concurrency)
    recipe = Recipe(checkpoint, load_profile(profile), workspace)
    if not (url and reference_url):
        require_folder(checkpoint, "checkpoint folder")
    # the candidate first: it may not have been built
    candidate = questions.to_server(url) if url else questions.in_process(lambda: built_model(recipe), profile)
    if reference_url:
        reference = questions.to_server(reference_url)
    else:
        reference = questions.in_process(lambda: reference_model(recipe), "the unquantised model")
    comparison = Comparison(reference, candidate)
    verdict = drop_verdict(comparison, max_drop_points=max_drop)
    _print_json(comparison, verdict, profile) if json_output else _print_tables(comparison, verdict, profile)
    raise typer.Exit(0 if verdict.holds else 1)


@group.command()
def numerics(
    checkpoint: CheckpointArgument,
    profile: ProfileOption = "cpu",
    workspace: WorkspaceOption = Path(),
    onnx: Annotated[
        Path | None, typer.Option(help="This graph, or the vision.onnx in this folder, not the profile's.")
    ] = None,
    tiles: Annotated[int, typer.Option(min=1, help="How many tiles are compared operation by operation.")] = 2,
    samples: Annotated[
        Path | None, typer.Option(help="Folder with samples.jsonl: tiles of its pictures, not noise.")
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """The vision graph against torch in float32, stage by stage; on failure the operation that broke.

    One stage's weights are in memory at a time. Without --onnx it is the graph that `nvlm build` exports and makes the
    engine of, and, where ONNX Runtime serves it, then the engine at its end. A graph that has lost the names of its
    values or weights cannot be judged operation by operation: exit code 1, as for a wrong one.
    """
    from nvlm_deploy.profile import load_profile
    from nvlm_deploy.recipe import Recipe
    from nvlm_deploy.report.progress import progress
    from nvlm_deploy.samples import read_samples
    from nvlm_deploy.steps.vision import end_tiles, gate_tiles, require_served_engine
    from nvlm_deploy.vision.numerics.check import check_numerics
    from nvlm_deploy.vision.stages import stages
    from nvlm_deploy.vision.tensorrt import precision_of

    recipe = Recipe(checkpoint, load_profile(profile), workspace)
    spec, graph, pictures = recipe.spec, onnx or recipe.vision_onnx, read_samples(samples) if samples else ()
    reading = recipe.profile.serving.image_reading
    given = gate_tiles(spec, end_tiles(spec, tiles, precision_of(graph), pictures), pictures, reading)
    with progress("stages compared", len(stages(spec.vision))) as on_stage:
        report = check_numerics(graph, recipe.checkpoint, spec, given, bisected=tiles, on_stage=on_stage)
    served = require_served_engine(recipe, given, report) if report.passed and onnx is None else None
    document = report.as_json() | {"engine": served}
    print(json.dumps(document, indent=2)) if json_output else _print_numerics(report, served)
    raise typer.Exit(0 if report.passed else 1)


def _print_numerics(report: NumericsReport, served: Mapping[str, Any] | None) -> None:
    from nvlm_deploy.validate.numerics import numerics_table

    console = Console(highlight=False, soft_wrap=True)
    console.print(numerics_table(report))
    console.print(report.sentence, markup=False)
    for finding in report.findings[1:]:
        console.print(f"  {finding}", markup=False)
    if served and served["evidence"] == "measured":
        console.print(f"the engine in ONNX Runtime: cosine {served['cosine']:.7f}", markup=False)
    elif served:
        console.print(f"the engine: not run: {served['why']}", markup=False)


def _print_json(comparison: Comparison, verdict: IntervalVerdict, candidate: str) -> None:
    from nvlm_deploy.validate.accuracy import comparison_as_json, model_results

    results = model_results(comparison, reference="unquantised", candidate=candidate)
    document = {
        "models": [result.as_json() for result in results],
        **comparison_as_json(comparison),
        "bars": [verdict.as_json()],
    }
    print(json.dumps(document, indent=2))


def _print_tables(comparison: Comparison, verdict: IntervalVerdict, candidate: str) -> None:
    from nvlm_deploy.report.measurement import Outcome
    from nvlm_deploy.report.tables import difference_sentence, results_table, undecided_sentence, verdict_table
    from nvlm_deploy.validate.accuracy import model_results

    console = Console(highlight=False)
    console.print(results_table(model_results(comparison, reference="unquantised", candidate=candidate)))
    difference = comparison.differences["all"]
    console.print(difference_sentence("unquantised", candidate, difference, comparison.agreement))
    console.print(verdict_table([verdict]))
    if verdict.outcome is Outcome.UNDECIDED:
        console.print(undecided_sentence(verdict), markup=False)
