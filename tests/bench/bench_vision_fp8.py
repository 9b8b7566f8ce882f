"""FP8 in the vision encoder: what it costs in answers, and whether a real TensorRT builder takes the files.

    python tests/bench/bench_vision_fp8.py              accuracy and cosines of the small model, engines of both widths
    python tests/bench/bench_vision_fp8.py --small      without the 4 blocks at full width (5 GB of disk, some minutes)

Prints a table and, as its last line, one JSON object. Exit code 1 when a bar does not hold.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from nvlm_deploy.checkpoint.reader import Checkpoint
from nvlm_deploy.demo import Assets
from nvlm_deploy.model.spec import ModelSpec, spec_from_checkpoint
from nvlm_deploy.model.vision import vision_tower_from_checkpoint
from nvlm_deploy.profile import load_profile
from nvlm_deploy.recipe import Recipe
from nvlm_deploy.report.device import device_name
from nvlm_deploy.report.measurement import Bar, Measurement, Verdict, all_hold
from nvlm_deploy.report.tables import difference_sentence, verdict_table
from nvlm_deploy.sample_embeddings import tiles_of_file
from nvlm_deploy.samples import Sample, read_samples
from nvlm_deploy.sku import TENSORRT_RTX, load_sku
from nvlm_deploy.validate.accuracy import drop_verdict
from nvlm_deploy.validate.in_process import InProcessModel, reference_model
from nvlm_deploy.validate.tasks import Comparison, Scored, scored
from nvlm_deploy.vision.engine import OnnxRuntimeEngine
from nvlm_deploy.vision.export import Fp8Source, onnx_from_checkpoint
from nvlm_deploy.vision.lowering import write_lowered
from nvlm_deploy.vision.numerics.compare import cosines, noise_tiles
from nvlm_deploy.vision.qdq import Fp8Choice
from nvlm_deploy.vision.tensorrt import BuildSettings, engine_from_onnx, tile_range

HERE = Path(__file__).parent
WORKSPACE = Path("engines/bench/vision-fp8")
CALIBRATION_SAMPLES = 32
LARGEST_DROP_POINTS, LEAST_COSINE = 1.0, 0.99
SKUS = ("l40s", "rtx-pro-6000")  # SM89 and SM120
PRECISIONS = ("bf16", "fp8")
FULL_WIDTH_LAYERS = 4
FULL_WIDTH_HEAD_SIZE = 128


def pictures(samples: list[Sample], spec: ModelSpec) -> list[Any]:
    paths = dict.fromkeys(image for sample in samples for image in sample.images)
    return [tiles_of_file(path, spec.tiling) for path in paths]


def exported(checkpoint: Checkpoint, folder: Path, precision: str, tiles: list[Any], choice: Fp8Choice) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    fp8 = Fp8Source(choice, tiles) if precision == "fp8" else None
    return onnx_from_checkpoint(checkpoint, spec_from_checkpoint(checkpoint), folder, precision=precision, fp8=fp8)


def texts_of(model: InProcessModel, samples: list[Sample]) -> list[Scored]:
    return scored(samples, list(model.texts(samples, max_tokens=16)))


def accuracy_verdicts(console: Console) -> Iterator[Verdict]:
    """Per tensor and per channel, with and without attention: all held-out questions about pictures."""
    assets = Assets.of_checkout()
    recipe = Recipe(assets.model, load_profile("cpu"), WORKSPACE, assets.calibration)
    samples = [sample for sample in read_samples(assets.held_out) if sample.images]
    calibration = pictures(read_samples(assets.calibration, limit=CALIBRATION_SAMPLES), recipe.spec)
    tower = vision_tower_from_checkpoint(recipe.checkpoint, recipe.spec)
    tiles = np.concatenate(pictures(samples, recipe.spec))
    with torch.inference_mode():
        expected = tower(torch.from_numpy(tiles)).numpy()
    float32 = reference_model(recipe)
    reference = texts_of(float32, samples)
    for scales in ("per_tensor", "per_channel"):
        for attention in (False, True):
            name = f"FP8 {scales}{' with attention' if attention else ''}".replace("_", " ")
            folder = WORKSPACE / name.replace(" ", "-")
            graph = exported(recipe.checkpoint, folder, "fp8", calibration, Fp8Choice(scales, attention))
            engine = OnnxRuntimeEngine(write_lowered(graph, folder / "lowered"))
            embedder = dataclasses.replace(float32.embedder, encode=engine)
            candidate = texts_of(dataclasses.replace(float32, embedder=embedder), samples)
            comparison = Comparison(reference, candidate)
            difference = comparison.differences["all"]
            console.print(difference_sentence("float32", name, difference, comparison.agreement))
            judged = drop_verdict(comparison, max_drop_points=LARGEST_DROP_POINTS)
            named = dataclasses.replace(judged.measurement, name=f"{name}: accuracy lost")
            yield dataclasses.replace(judged, measurement=named)
            lowest = float(cosines(engine(tiles), expected).min())
            yield Verdict(
                Measurement(f"{name}: least cosine of a tile", lowest, "", len(tiles)), Bar("at least", LEAST_COSINE)
            )


def engine_verdicts(checkpoint: Checkpoint, what: str) -> Iterator[Verdict]:
    """Every engine that TensorRT-RTX builds here, and whether attention is one kernel in every block.

    That is judged at full width only: for the small model's narrow heads the builder has no FP8 attention kernel.
    """
    spec = spec_from_checkpoint(checkpoint)
    full_width = spec.vision.head_size == FULL_WIDTH_HEAD_SIZE
    tiles = [noise_tiles(1, spec.tiling.tile_size)]
    for precision in PRECISIONS:
        graph = exported(checkpoint, WORKSPACE / f"{what} {precision}", precision, tiles, Fp8Choice(attention=True))
        for sku in SKUS:
            folder = WORKSPACE / f"{what} {precision} {sku}"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            settings = BuildSettings(
                TENSORRT_RTX, load_sku(sku), tile_range(spec.tiling, most_tiles=14), WORKSPACE / "cache"
            )
            plan = engine_from_onnx(graph, folder, settings)
            facts = json.loads((folder / "vision.plan.json").read_text())
            fused = (folder / "builder.log").read_text().count("\nName: _gemm_mha")
            name = f"{what} {precision} {sku}, {facts['seconds']:.0f} s: MB of plan"
            yield Verdict(Measurement(name, plan.stat().st_size / 1e6, "MB", 1), Bar("at least", 0.1))
            if full_width:
                name = f"{what} {precision} {sku}: blocks with fused attention"
                yield Verdict(Measurement(name, fused, "", spec.vision.layers), Bar("at least", spec.vision.layers))
            plan.unlink()


def full_width_checkpoint() -> Checkpoint:
    folder = Path("engines/bench/vision-export") / f"checkpoint-{FULL_WIDTH_LAYERS}"
    if not (folder / "config.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, str(HERE / "synthetic.py"), str(folder), str(FULL_WIDTH_LAYERS)], check=True)
    return Checkpoint.open(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="leave out the encoder of full width")
    small_only = parser.parse_args().small
    console = Console(width=100, highlight=False)
    judged = list(accuracy_verdicts(console))
    judged += engine_verdicts(Checkpoint.open(Assets.of_checkout().model), "small")
    if not small_only:
        judged += engine_verdicts(full_width_checkpoint(), f"full width, {FULL_WIDTH_LAYERS} blocks,")
    console.print(verdict_table(judged))
    results = {verdict.measurement.name: verdict.measurement.value for verdict in judged}
    bars = [verdict.as_json() for verdict in judged]
    print(json.dumps({"name": "vision_fp8", "device": device_name(), "results": results, "bars": bars}))
    return 0 if all_hold(judged) else 1


if __name__ == "__main__":
    sys.exit(main())
