"""export-vision: checkpoint to ONNX. build-vision: ONNX through the numerics gate to an engine."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvlm_deploy.artifacts import write_text
from nvlm_deploy.fingerprint import built_here
from nvlm_deploy.image_file.opening import AS_VIEWED
from nvlm_deploy.image_file.reading import ImageReading
from nvlm_deploy.model.inventory import vision_tensors
from nvlm_deploy.pipeline import Step
from nvlm_deploy.profile import Profile
from nvlm_deploy.recipe import Recipe
from nvlm_deploy.sample_embeddings import tiles_of_file, tiles_of_pictures
from nvlm_deploy.samples import Sample
from nvlm_deploy.sku import ONNX_RUNTIME, TENSORRT, TENSORRT_RTX, load_sku
from nvlm_deploy.steps.calibration_list import require_whole_pictures

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from nvlm_deploy.model.spec import ModelSpec
    from nvlm_deploy.vision.engine import OnnxRuntimeEngine
    from nvlm_deploy.vision.export import Fp8Source
    from nvlm_deploy.vision.numerics.report import NumericsReport

REPORT_NAME = "numerics.json"
TOOLS = {ONNX_RUNTIME: "onnxruntime", TENSORRT: "tensorrt", TENSORRT_RTX: "tensorrt_rtx_cu13_libs"}
# FP8's end is judged on up to so many tiles, as long as they take no more than so much arithmetic
FP8_END_TILES, END_FLOPS = 32, 1e12
FP8_CHOICES = {"weight_scales", "fp8_attention"}


def export_vision(recipe: Recipe) -> Step:
    """The encoder and projector as ONNX in the profile's precision; resumes after a kill."""
    choice = recipe.profile.vision
    inputs, settings = recipe.checkpoint_inputs(), choice.model_dump(include={"precision"})
    if choice.precision == "fp8":
        inputs |= recipe.calibration_inputs()
        settings |= choice.model_dump(include=FP8_CHOICES) | {"calibration samples": len(recipe.samples())}
        settings |= recipe.profile.serving.image_reading.choices()

    def make(folder: Path) -> Mapping[str, Any]:
        from nvlm_deploy.vision.export import vision_export

        fp8 = _fp8_source(recipe) if choice.precision == "fp8" else None
        export = vision_export(recipe.checkpoint, recipe.spec, precision=choice.precision, fp8=fp8)
        export.write(folder, recipe.on_progress)
        return export.notes

    tools = ("torch", "onnx", "onnxscript")
    return Step("export-vision", recipe.vision_folder, inputs, settings, make, tools, resumes=True)


def build_vision(recipe: Recipe) -> Step:
    """The engine of the profile's runtime; a graph that fails the numerics gate never becomes one."""
    choice, sku = recipe.profile.vision, load_sku(recipe.profile.sku)
    inputs = {"vision": recipe.vision_folder, **recipe.checkpoint_inputs()}
    settings = choice.model_dump(exclude=FP8_CHOICES) | {"sku": sku.build_facts}

    def make(folder: Path) -> Mapping[str, Any]:
        from nvlm_deploy.vision.numerics.check import require_numerics

        placed = recipe.placed_samples() if recipe.calibration_folder else []
        reading = recipe.profile.serving.image_reading
        require_whole_pictures(placed, reading)
        samples = [sample for _, sample in placed]
        count = end_tiles(recipe.spec, choice.gate_tiles, choice.precision, samples)
        tiles = gate_tiles(recipe.spec, count, samples, reading)
        report = require_numerics(recipe.vision_onnx, recipe.checkpoint, recipe.spec, tiles, bisected=choice.gate_tiles)
        _write_engine(recipe, folder)
        document = report.as_json() | {"engine": _judged_engine(recipe, folder, tiles, report)}
        write_text(folder / REPORT_NAME, json.dumps(document, indent=1) + "\n")
        return {"numerics": report.sentence}

    return Step(
        "build-vision",
        recipe.vision_engine_folder,
        inputs,
        settings,
        make,
        (TOOLS[choice.runtime],),
        revision=2,
        bound_to=partial(built_here, choice.runtime, compute_capability=sku.compute_capability),
    )


def require_served_engine(
    recipe: Recipe, tiles: npt.NDArray[np.uint8], report: NumericsReport
) -> dict[str, Any] | None:
    """The engine in the workspace, judged on `tiles`; None where there is none yet.

    Raises RejectedError when it fails although the graph in `report` has passed.
    """
    folder = recipe.vision_engine_folder
    return _judged_engine(recipe, folder, tiles, report) if folder.exists() else None


def _judged_engine(
    recipe: Recipe, folder: Path, tiles: npt.NDArray[np.uint8], report: NumericsReport
) -> dict[str, Any]:
    """What is served, judged by itself: another program made it of the graph that passed."""
    from nvlm_deploy.vision.numerics.engine_check import require_engine
    from nvlm_deploy.vision.numerics.report import difference_as_json

    if recipe.profile.vision.runtime != ONNX_RUNTIME:
        why = f"a plan runs on its GPU only ({recipe.profile.sku}); it was built from the graph that is judged here"
        return {"evidence": "not run", "why": why}
    assert report.expected is not None  # the report passed
    found = require_engine(folder / recipe.vision_onnx.name, tiles, report.expected, report.precision)
    return {"evidence": "measured", **difference_as_json(found), "bound": report.end_bounds.cosine}


def encoder_without_gpu(recipe: Recipe, scratch: Path) -> OnnxRuntimeEngine:
    """The exported graph in ONNX Runtime whatever the profile's runtime is, so that calibration needs no engine."""
    from nvlm_deploy.vision.engine import OnnxRuntimeEngine
    from nvlm_deploy.vision.lowering import write_lowered

    return OnnxRuntimeEngine(write_lowered(recipe.vision_onnx, scratch))


def require_buildable(profile: Profile) -> None:
    """Refuse an engine that the profile's GPU could not run, before anything is read. Needs no builder."""
    from nvlm_deploy.vision.tensorrt import require_target

    sku, vision = load_sku(profile.sku), profile.vision
    if vision.runtime != ONNX_RUNTIME:
        require_target(vision.runtime, vision.precision, sku)


def require_encoder_builder(profile: Profile) -> None:
    """Raises MachineError where the builder of the profile's vision runtime is not installed."""
    from nvlm_deploy.vision.tensorrt import installed_module

    if profile.vision.runtime != ONNX_RUNTIME:
        installed_module(profile.vision.runtime)


def _write_engine(recipe: Recipe, folder: Path) -> None:
    from nvlm_deploy.vision.lowering import write_lowered
    from nvlm_deploy.vision.tensorrt import BuildSettings, engine_from_onnx, tile_range

    vision = recipe.profile.vision
    if vision.runtime == ONNX_RUNTIME:
        write_lowered(recipe.vision_onnx, folder)
        return
    tiles = tile_range(recipe.spec.tiling, most_tiles=vision.max_tiles_per_run)
    settings = BuildSettings(vision.runtime, load_sku(recipe.profile.sku), tiles, recipe.builder_cache)
    engine_from_onnx(recipe.vision_onnx, folder, settings)


def end_tiles(spec: ModelSpec, count: int, precision: str, samples: Sequence[Sample] = ()) -> int:
    """On how many tiles the embeddings are compared where `count` are bisected.

    FP8's bound is one of every tile, and two tiles are few to say so: more of them where there are pictures, and the
    model is so small that it costs seconds. At the released size a tile takes 12 TFLOP each in the graph and in the
    reference: there it is `count`.
    """
    if precision != "fp8" or not samples:
        return count
    values = sum(math.prod(shape) for shape in vision_tensors(spec).values())
    return max(count, min(FP8_END_TILES, int(END_FLOPS / (2 * values * spec.vision.positions))))


def gate_tiles(
    spec: ModelSpec, count: int, samples: Sequence[Sample] = (), reading: ImageReading = AS_VIEWED
) -> npt.NDArray[np.uint8]:
    """What the numerics gate looks at, uint8 [at most count, S, S, 3]: tiles of the samples' pictures, else noise.

    The first tile of each picture in order, then the second of each, and so on: neighbours in one picture are much
    alike. FP8 is calibrated with pictures: noise may lie outside of what its scales hold.
    """
    import numpy as np

    from nvlm_deploy.vision.numerics.compare import noise_tiles

    pictures = [tiles_of_file(path, spec.tiling, reading) for path in _pictures(samples)[:count]]
    if not pictures:
        return noise_tiles(count, spec.tiling.tile_size)
    rounds = range(max(map(len, pictures)))
    in_turn = [picture[number] for number in rounds for picture in pictures if number < len(picture)]
    return np.stack(in_turn[:count])


def _pictures(samples: Sequence[Sample]) -> list[Path]:
    return list(dict.fromkeys(image for sample in samples for image in sample.images))


def _fp8_source(recipe: Recipe) -> Fp8Source:
    """With the tiles of every picture in the calibration list, once each."""
    from nvlm_deploy.vision.export import Fp8Source
    from nvlm_deploy.vision.qdq import Fp8Choice

    choice = recipe.profile.vision
    reading = recipe.profile.serving.image_reading
    tiles = tiles_of_pictures(recipe.placed_samples(), recipe.spec.tiling, reading)
    return Fp8Source(Fp8Choice(choice.weight_scales, choice.fp8_attention), [*tiles.values()])
