"""export-vision: checkpoint to ONNX. build-vision: ONNX through the numerics gate to an engine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvlm_deploy.artifacts import write_text
from nvlm_deploy.pipeline import Step
from nvlm_deploy.profile import Profile
from nvlm_deploy.recipe import Recipe
from nvlm_deploy.sample_embeddings import tiles_of_file
from nvlm_deploy.samples import Sample
from nvlm_deploy.sku import load_sku

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from nvlm_deploy.model.spec import ModelSpec
    from nvlm_deploy.vision.export import Fp8Source

ONNX_RUNTIME = "onnxruntime"
REPORT_NAME = "numerics.json"
TOOLS = {ONNX_RUNTIME: "onnxruntime", "tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt_rtx_cu13_libs"}
FP8_CHOICES = {"weight_scales", "fp8_attention"}


def export_vision(recipe: Recipe) -> Step:
    """The encoder and projector as ONNX in the profile's precision; resumes after a kill."""
    choice = recipe.profile.vision
    inputs, settings = recipe.checkpoint_inputs(), choice.model_dump(include={"precision"})
    if choice.precision == "fp8":
        inputs |= recipe.calibration_inputs()
        settings |= choice.model_dump(include=FP8_CHOICES) | {"calibration samples": len(recipe.samples())}

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
    settings = choice.model_dump(exclude=FP8_CHOICES) | {"sku": sku.model_dump(mode="json")}

    def make(folder: Path) -> Mapping[str, Any]:
        from nvlm_deploy.vision.numerics.check import require_numerics

        samples = recipe.samples() if recipe.calibration_folder else ()
        tiles = gate_tiles(recipe.spec, choice.gate_tiles, samples)
        report = require_numerics(recipe.vision_onnx, recipe.checkpoint, recipe.spec, tiles)
        _write_engine(recipe, folder)
        write_text(folder / REPORT_NAME, json.dumps(report.as_json(), indent=1) + "\n")
        return {"numerics": report.sentence}

    return Step("build-vision", recipe.vision_engine_folder, inputs, settings, make, (TOOLS[choice.runtime],))


def require_buildable(profile: Profile) -> None:
    """Refuse an engine that the profile's GPU could not run, before anything is read."""
    from nvlm_deploy.vision.tensorrt import installed_module, require_target

    sku, vision = load_sku(profile.sku), profile.vision
    if vision.runtime != ONNX_RUNTIME:
        require_target(vision.runtime, vision.precision, sku)
        installed_module(vision.runtime)


def _write_engine(recipe: Recipe, folder: Path) -> None:
    from nvlm_deploy.vision.lowering import write_lowered
    from nvlm_deploy.vision.tensorrt import BuildSettings, engine_from_onnx, tile_range

    vision = recipe.profile.vision
    if vision.runtime == ONNX_RUNTIME:
        write_lowered(recipe.vision_onnx, folder)
        return
    tiles = tile_range(recipe.spec.tiling, most_tiles=vision.max_tiles_per_run)
    cache = recipe.workspace / "engines" / "builder-cache"
    engine_from_onnx(
        recipe.vision_onnx, folder, BuildSettings(vision.runtime, load_sku(recipe.profile.sku), tiles, cache)
    )


def gate_tiles(spec: ModelSpec, count: int, samples: Sequence[Sample] = ()) -> npt.NDArray[np.uint8]:
    """What the numerics gate looks at, uint8 [tiles, S, S, 3]: the first tiles of the samples' pictures, else noise.

    FP8 is calibrated with pictures: noise may lie outside of what its scales hold.
    """
    import numpy as np

    from nvlm_deploy.vision.numerics.compare import noise_tiles

    tiles, found = [], 0
    for path in _pictures(samples):
        if found < count:
            tiles.append(tiles_of_file(path, spec.tiling)[: count - found])
            found += len(tiles[-1])
    return np.concatenate(tiles) if tiles else noise_tiles(count, spec.tiling.tile_size)


def _pictures(samples: Sequence[Sample]) -> list[Path]:
    return list(dict.fromkeys(image for sample in samples for image in sample.images))


def _fp8_source(recipe: Recipe) -> Fp8Source:
    """With the tiles of every picture in the calibration list, once each."""
    from nvlm_deploy.vision.export import Fp8Source
    from nvlm_deploy.vision.qdq import Fp8Choice

    choice = recipe.profile.vision
    tiles = [tiles_of_file(path, recipe.spec.tiling) for path in _pictures(recipe.samples())]
    return Fp8Source(Fp8Choice(choice.weight_scales, choice.fp8_attention), tiles)
