"""What the decoder's precisions cost in right answers: BF16, FP8, FP8 per channel and token, FP8 with an FP8 cache.

    python tests/bench/bench_decoder_accuracy.py

The small model's checkpoints are written from one calibration and read back by the reference decoder, which computes in
bfloat16 as an engine does. All of them get the same prompts, the unquantised encoder's visual embeddings among them.
Prints one table with 95 % intervals, the paired differences, and as its last line one JSON object. Exit code 1 when a
bar does not hold.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from nvlm_deploy.checkpoint.trtllm_layout import FP8, FP8_PER_CHANNEL
from nvlm_deploy.demo import Assets
from nvlm_deploy.llm.calibrate import CalibrationResult, calibrate
from nvlm_deploy.llm.trtllm import trtllm_checkpoint_from
from nvlm_deploy.model.reference import decoder_from_trtllm
from nvlm_deploy.profile import load_profile
from nvlm_deploy.recipe import Recipe
from nvlm_deploy.report.device import device_name
from nvlm_deploy.report.measurement import Bar, Measurement, Verdict, all_hold
from nvlm_deploy.report.tables import ModelResult, difference_sentence, results_table, verdict_table
from nvlm_deploy.samples import read_samples
from nvlm_deploy.validate.accuracy import Questions, comparison_as_json, drop_verdict
from nvlm_deploy.validate.in_process import InProcessModel, reference_model
from nvlm_deploy.validate.tasks import ALL, Comparison, Scored, accuracy_by_task

# name -> (quant_algo, kv_cache_quant_algo)
PRECISIONS: dict[str, tuple[str | None, str | None]] = {
    "BF16": (None, None),
    "FP8": (FP8, None),
    "FP8 per channel": (FP8_PER_CHANNEL, None),
    "FP8 + FP8 KV": (FP8, FP8),
}
REFERENCE = "BF16"
LEAST_QUESTIONS = 600
LARGEST_DROP_POINTS = 1.0
LONGEST_ANSWER = 16


def with_remembered_pictures(model: InProcessModel) -> InProcessModel:
    """The encoder runs once for each picture, whoever asks about it."""
    known: dict[bytes, Any] = {}
    encode = model.embedder.encode

    def remembered(tiles: Any) -> Any:
        key = tiles.tobytes()
        if key not in known:
            known[key] = encode(tiles)
        return known[key]

    return dataclasses.replace(model, embedder=dataclasses.replace(model.embedder, encode=remembered))


def calibrated(recipe: Recipe, model: InProcessModel) -> CalibrationResult:
    samples = read_samples(Assets.of_checkout().calibration)
    return calibrate(recipe.checkpoint, recipe.spec, [model.embedder.prompt_and_answer(one) for one in samples])


def candidates(
    recipe: Recipe, model: InProcessModel, folder: Path
) -> Iterator[tuple[str, Callable[[], InProcessModel]]]:
    """Every precision's model, from a checkpoint written in `folder`."""
    calibration = calibrated(recipe, model)
    embedder = dataclasses.replace(model.embedder, table=model.embedder.table.bfloat16())
    for name, (quant_algo, kv_cache) in PRECISIONS.items():
        written = trtllm_checkpoint_from(
            recipe.checkpoint,
            recipe.spec,
            folder / name.replace(" ", "-"),
            calibration=calibration,
            quant_algo=quant_algo,
            kv_cache_quant_algo=kv_cache,
        )
        decoder = decoder_from_trtllm(written, torch.bfloat16)
        yield name, lambda decoder=decoder: dataclasses.replace(model, embedder=embedder, decoder=decoder)


def answered(questions: Questions) -> dict[str, list[Scored]]:
    recipe = Recipe(Assets.of_checkout().model, load_profile("cpu"), Path("engines/bench/decoder-accuracy"))
    model = with_remembered_pictures(reference_model(recipe))
    with tempfile.TemporaryDirectory() as folder:
        return {name: questions.in_process(make, name) for name, make in candidates(recipe, model, Path(folder))}


def verdicts(comparisons: dict[str, Comparison], asked: int) -> Iterator[Verdict]:
    yield Verdict(Measurement("held-out questions", asked, "", asked), Bar("at least", LEAST_QUESTIONS))
    for name, comparison in comparisons.items():
        judged = drop_verdict(comparison, max_drop_points=LARGEST_DROP_POINTS)
        named = dataclasses.replace(judged.measurement, name=f"{name}: accuracy lost")
        yield dataclasses.replace(judged, measurement=named)


def main() -> int:
    console = Console(width=132, highlight=False)
    questions = Questions(read_samples(Assets.of_checkout().held_out), max_tokens=LONGEST_ANSWER)
    answers = answered(questions)
    models = [ModelResult(name, accuracy_by_task(scored)) for name, scored in answers.items()]
    comparisons = {name: Comparison(answers[REFERENCE], found) for name, found in answers.items() if name != REFERENCE}
    console.print(results_table(models))
    for name, comparison in comparisons.items():
        console.print(difference_sentence(REFERENCE, name, comparison.differences[ALL], comparison.agreement))
    judged = list(verdicts(comparisons, len(questions.samples)))
    console.print(verdict_table(judged))
    results = {model.title: model.as_json() for model in models}
    results |= {f"{name} against {REFERENCE}": comparison_as_json(one) for name, one in comparisons.items()}
    bars = [verdict.as_json() for verdict in judged]
    print(json.dumps({"name": "decoder_accuracy", "device": device_name(), "results": results, "bars": bars}))
    return 0 if all_hold(judged) else 1


if __name__ == "__main__":
    sys.exit(main())
