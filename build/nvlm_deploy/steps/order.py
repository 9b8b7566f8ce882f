"""The steps in their order, after a look at everything that would fail hours later."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial

from nvlm_deploy.pipeline import Pipeline, Step
from nvlm_deploy.recipe import Recipe
from nvlm_deploy.steps.assembly import assemble
from nvlm_deploy.steps.decoder import quantize_llm
from nvlm_deploy.steps.vision import build_vision, export_vision, require_buildable

STEPS: Mapping[str, Callable[[Recipe], Step]] = {
    "export-vision": export_vision,
    "build-vision": build_vision,
    "quantize-llm": quantize_llm,
    "assemble": assemble,
}


def pipeline_of(recipe: Recipe, only: str | None = None) -> Pipeline:
    """The steps in order, or one. Raises NvlmError when what they read is not usable."""
    chosen = {name: partial(make, recipe) for name, make in STEPS.items() if only in (None, name)}
    _require_inputs(recipe, chosen)
    return Pipeline(recipe.engines / ".lock", chosen)


def _require_inputs(recipe: Recipe, steps: Collection[str]) -> None:
    recipe.prompts().require_matches(recipe.spec)
    recipe.require_lengths()
    if "build-vision" in steps:
        require_buildable(recipe.profile)
    if "quantize-llm" in steps:
        recipe.layout()
    quantised = {"export-vision": recipe.profile.vision.precision, "quantize-llm": recipe.profile.decoder.quantization}
    if any(quantised.get(step) == "fp8" for step in steps):
        recipe.samples()
