"""assemble: the Triton model repository of what the other steps made."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvlm_deploy.artifacts import sha256_of_json
from nvlm_deploy.pipeline import Step
from nvlm_deploy.recipe import TOKENIZER_NAME, Recipe

if TYPE_CHECKING:
    from nvlm_deploy.triton.ensemble import ServingChoices

KV_CACHE_DTYPES = {"16bit": "bfloat16", "fp8": "float8_e4m3fn"}


def assemble(recipe: Recipe) -> Step:
    """The repository; every config is re-parsed and cross-checked."""
    inputs = {
        "vision": recipe.vision_engine_folder,
        "decoder": recipe.decoder_folder,
        TOKENIZER_NAME: recipe.tokenizer,
    }

    def make(folder: Path) -> Mapping[str, Any]:
        from nvlm_deploy.triton.repository import RepositorySources, write_repository

        sources = RepositorySources(recipe.vision_engine_folder, recipe.decoder_folder, recipe.tokenizer, recipe.spec)
        write_repository(folder, sources, _serving_choices(recipe))
        return {}

    return Step("assemble", recipe.repository, inputs, _settings(recipe), make, ("tritonclient",))


def _settings(recipe: Recipe) -> dict[str, Any]:
    """Assembling is cheap, so whatever its code would write differently counts as another choice."""
    from nvlm_deploy.triton.ensemble import ensemble_configs
    from nvlm_deploy.triton.pbtxt import config_text

    configs = ensemble_configs(recipe.spec, _serving_choices(recipe), vision_digest="any")
    texts = {config.name: config_text(config) for config in configs}
    spec = dataclasses.asdict(recipe.spec)
    return {"profile": recipe.profile.name, "spec": spec, "configs": sha256_of_json(texts)}


def _serving_choices(recipe: Recipe) -> ServingChoices:
    from nvlm_deploy.triton.ensemble import ServingChoices

    vision, decoder, serving = recipe.profile.vision, recipe.profile.decoder, recipe.profile.serving
    return ServingChoices(
        vision_runtime=vision.runtime,
        max_tiles_per_run=vision.max_tiles_per_run,
        max_batch_size=decoder.max_batch_size,
        max_seq_len=decoder.max_seq_len,
        max_images=serving.max_images,
        default_max_tokens=serving.default_max_tokens,
        prompt_wrapper=serving.wrapper,
        kv_cache_dtype=KV_CACHE_DTYPES[decoder.kv_cache],
    )
