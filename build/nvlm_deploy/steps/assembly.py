"""assemble: the Triton model repository of what the other steps made."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.manifest import sha256_of_json
from nvlm_deploy.pipeline import Step
from nvlm_deploy.recipe import TOKENIZER_NAME, Recipe
from nvlm_deploy.sku import TENSORRT_LLM, load_sku

if TYPE_CHECKING:
    from nvlm_deploy.planning.memory import MemoryAccount
    from nvlm_deploy.triton.choices import ServingChoices

KV_CACHE_DTYPES = {"16bit": "bfloat16", "fp8": "float8_e4m3fn"}
PAGED_CONTEXT = "plugin_config.use_paged_context_fmha"


def assemble(recipe: Recipe) -> Step:
    """The repository; every config is re-parsed and cross-checked, with the engines in it where there are any."""
    decoder = recipe.decoder_engine_folder if _has_engines(recipe) else recipe.decoder_folder
    inputs = {"vision": recipe.vision_engine_folder, "decoder": decoder, TOKENIZER_NAME: recipe.tokenizer}

    def make(folder: Path) -> Mapping[str, Any]:
        from nvlm_deploy.triton.repository import RepositorySources, write_repository

        sources = RepositorySources(recipe.vision_engine_folder, decoder, recipe.tokenizer, recipe.spec)
        write_repository(folder, sources, _serving_choices(recipe))
        return {}

    # links and configs: made in seconds, so that no former repository is kept
    return Step("assemble", recipe.repository, inputs, _settings(recipe), make, ("tritonclient",), is_cheap=True)


def _has_engines(recipe: Recipe) -> bool:
    return recipe.profile.decoder.runtime == TENSORRT_LLM


def _settings(recipe: Recipe) -> dict[str, Any]:
    """Assembling is cheap, so whatever its code would write differently counts as another choice."""
    from nvlm_deploy.triton.ensemble import ensemble_configs

    configs = ensemble_configs(recipe.spec, _serving_choices(recipe), vision_digest="any")
    # what they say, not their text: that is written by tritonclient, which a dry run does without
    texts = {config.name: repr(config) for config in configs}
    spec = dataclasses.asdict(recipe.spec)
    return {"profile": recipe.profile.name, "spec": spec, "configs": sha256_of_json(texts)}


def _serving_choices(recipe: Recipe) -> ServingChoices:
    from nvlm_deploy.triton.choices import ServingChoices

    vision, decoder, serving = recipe.profile.vision, recipe.profile.decoder, recipe.profile.serving
    choices = ServingChoices(
        vision_runtime=vision.runtime,
        max_tiles_per_run=vision.max_tiles_per_run,
        max_batch_size=decoder.max_batch_size,
        max_seq_len=decoder.max_seq_len,
        max_images=serving.max_images,
        default_max_tokens=serving.default_max_tokens,
        prompt_wrapper=serving.wrapper,
        images=serving.image_reading,
        max_request_bytes=serving.max_request_bytes,
        max_waiting_requests=serving.max_waiting_requests,
        max_waiting_bytes=serving.max_waiting_bytes,
        kv_cache_dtype=KV_CACHE_DTYPES[decoder.kv_cache],
    )
    return _with_engines(recipe, choices) if _has_engines(recipe) else choices


def _with_engines(recipe: Recipe, choices: ServingChoices) -> ServingChoices:
    from nvlm_deploy.llm.engine import plan_engines
    from nvlm_deploy.steps.decoder import engine_settings
    from nvlm_deploy.triton.choices import EngineChoices

    settings = engine_settings(recipe)
    arguments = plan_engines(recipe.layout(), settings.sku, settings.limits).arguments
    paged = next(argument.expected is True for argument in arguments if argument.field == PAGED_CONTEXT)
    account = _account(recipe)
    engines = EngineChoices(account.kv_tokens, account.kv_share_of_free, paged)
    return dataclasses.replace(choices, engines=engines, max_num_tokens=settings.limits.max_num_tokens)


def require_room(recipe: Recipe) -> None:
    """Raises NvlmError where the GPUs of the profile's SKU hold the engines but no request beside them."""
    if _has_engines(recipe):
        _account(recipe)


def _account(recipe: Recipe) -> MemoryAccount:
    """As `nvlm plan` has them: the encoder lives on the first GPU too, whichever of the two is loaded first."""
    from nvlm_deploy.planning.memory import memory_account, room_of

    account = memory_account(recipe.spec, recipe.profile, room_of(load_sku(recipe.profile.sku), 0))
    if not account.fits:
        raise NvlmError(
            f"profile {recipe.profile.name!r} {account.why_not}: no sequence of max_seq_len fits beside the engines",
            hint="`nvlm profiles CHECKPOINT` lists what fits",
        )
    return account
