"""The steps in their order, after a look at everything that would fail hours later."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.pipeline import Pipeline, State, Step, require_finished, state_of
from nvlm_deploy.recipe import Recipe, steps_of_build
from nvlm_deploy.steps.assembly import assemble, require_room
from nvlm_deploy.steps.calibration_list import warn_of_too_few
from nvlm_deploy.steps.decoder import (
    build_llm,
    calibrate_llm,
    export_hf,
    quantize_llm,
    require_calibration,
    require_engine_builder,
    require_engines,
    require_scales,
)
from nvlm_deploy.steps.vision import build_vision, export_vision, require_buildable, require_encoder_builder

STEPS: Mapping[str, Callable[[Recipe], Step]] = {
    "export-vision": export_vision,
    "build-vision": build_vision,
    "calibrate-llm": calibrate_llm,
    "quantize-llm": quantize_llm,
    "export-hf": export_hf,
    "build-llm": build_llm,
    "assemble": assemble,
}


# what each step makes its artifact of, beside the checkpoint
READS = {
    "build-vision": ("export-vision",),
    "calibrate-llm": ("export-vision",),
    "quantize-llm": ("calibrate-llm",),
    "export-hf": ("calibrate-llm",),
    "build-llm": ("quantize-llm",),
    "assemble": ("build-vision", "quantize-llm", "build-llm"),
}


def pipeline_of(recipe: Recipe, only: str | None = None, *, dry_run: bool = False) -> Pipeline:
    """The steps in order, or one. Raises NvlmError when what they read is not usable.

    One step alone takes nothing that steps before it made for another profile, checkpoint or calibration. A dry run
    asks for no tools and no artifacts: it plans on another machine than the one that builds.
    """
    names = steps_of_build(recipe) if only is None else [only]
    _require_inputs(recipe, names, dry_run=dry_run)
    before = {} if only is None else _before(recipe, only)
    if not dry_run:
        before = {} if only is not None and _is_calibrated_elsewhere(recipe, only) else before
        require_finished(before)
    makers = {name: partial(STEPS[name], recipe) for name in names}
    lock = recipe.workspace / "engines" / ".lock"
    return Pipeline(lock, makers, profile=recipe.profile.model_dump(mode="json"), before=before)


def _before(recipe: Recipe, step: str) -> dict[str, Callable[[], Step]]:
    """Return what a step reads, and what that was made of, in the order in which they are made."""
    found: dict[str, Callable[[], Step]] = {}
    for name in READS.get(step, ()):
        if name in steps_of_build(recipe):
            # which encoder a calibration saw is in its key: that may be gone, or lie with another profile
            found |= {} if name == "calibrate-llm" else _before(recipe, name)
            found[name] = partial(STEPS[name], recipe)
    return found


def _is_calibrated_elsewhere(recipe: Recipe, step: str) -> bool:
    """Whether all that a calibration would be is here already, by way of another profile's encoder."""
    if step != "calibrate-llm" or recipe.vision_folder.exists():
        return False
    return state_of(calibrate_llm(recipe)) is State.UP_TO_DATE


def _require_readable_names(*folders: Path) -> None:
    """Raises NvlmError for a path of bytes that are no text: ONNX's libraries take none."""
    for folder in folders:
        try:
            str(folder.absolute()).encode()
        except UnicodeEncodeError:
            raise NvlmError(f"the path {str(folder)!a} is not UTF-8", hint="rename its folders") from None


def _require_inputs(recipe: Recipe, steps: Collection[str], *, dry_run: bool) -> None:
    spec = recipe.spec  # first of all: whatever else is wrong, a checkpoint that is not one is said as that
    _require_readable_names(recipe.workspace, recipe.checkpoint_folder)
    recipe.prompts().require_matches(spec)
    recipe.require_lengths()
    if "build-vision" in steps:
        require_buildable(recipe.profile)
        if not dry_run:
            require_encoder_builder(recipe.profile)
    if "quantize-llm" in steps:
        recipe.layout()
    if not {"quantize-llm", "export-hf"}.isdisjoint(steps):
        require_scales(recipe)
    if "build-llm" in steps:
        require_engines(recipe)
        if not dry_run:
            require_engine_builder()
    if "assemble" in steps:
        require_room(recipe)
    if "calibrate-llm" in steps:
        require_calibration(recipe)
    quantises_encoder = "export-vision" in steps and recipe.profile.vision.precision == "fp8"
    if quantises_encoder or "calibrate-llm" in steps:
        warn_of_too_few(recipe.placed_samples(), recipe.profile)
