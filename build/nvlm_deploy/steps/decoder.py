"""The decoder's steps: one calibration, and from it a TensorRT-LLM checkpoint with its engines or a HF folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvlm_deploy.checkpoint.hf_source import companions_of, layout_for
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.fingerprint import built_here
from nvlm_deploy.manifest import sha256_of_json
from nvlm_deploy.pipeline import Step, digest_of_input
from nvlm_deploy.recipe import KV_CACHE_QUANT_ALGOS, QUANT_ALGOS, TOKENIZER_NAME, Recipe
from nvlm_deploy.samples import blamed_on
from nvlm_deploy.sku import TENSORRT_LLM, load_sku
from nvlm_deploy.steps.calibration_list import ServedPrompts, require_whole_pictures
from nvlm_deploy.steps.vision import encoder_without_gpu, export_vision

if TYPE_CHECKING:
    import torch

    from nvlm_deploy.llm.calibrate import CalibrationResult
    from nvlm_deploy.llm.engine import EngineSettings

EMBEDDING_TABLE = "language_model.model.embed_tokens.weight"
RESULT_NAME = "calibration.json"


def calibrate_llm(recipe: Recipe) -> Step:
    """The largest magnitudes in every layer over the samples, pictures among them; resumes after a kill.

    The encoder is known by what it is exported from and how, not by its files: a profile of another split may take
    the result without an export of its own.
    """
    inputs = {
        **recipe.checkpoint_inputs(),
        TOKENIZER_NAME: recipe.tokenizer,
        **recipe.calibration_inputs(),
    }
    settings = recipe.calibration_settings() | {"samples": len(recipe.samples()), "encoder": export_vision(recipe).key}

    def make(folder: Path) -> Mapping[str, Any]:
        from nvlm_deploy.llm.calibrate import CalibrationResult, calibrate

        unfinished, vision = folder / "unfinished", digest_of_input(recipe.vision_folder)
        digest = sha256_of_json([_digests(inputs), vision, settings])
        result = CalibrationResult.saved(folder / RESULT_NAME)
        if result is None or result.samples_digest != digest:
            result = calibrate(
                recipe.checkpoint,
                recipe.spec,
                _embeddings(recipe, unfinished / "encoder"),
                work_folder=unfinished / "layers",
                samples_digest=digest,
                on_progress=recipe.on_progress,
            )
            result.save(folder / RESULT_NAME)
        shutil.rmtree(unfinished, ignore_errors=True)
        counts = {"samples": result.samples, "tokens": result.tokens}
        return {**counts, "samples_digest": result.samples_digest, "vision": vision}

    tools = ("torch", "onnxruntime")
    return Step("calibrate-llm", recipe.calibration_result_folder, inputs, settings, make, tools, resumes=True)


def quantize_llm(recipe: Recipe) -> Step:
    """The checkpoint of every rank; resumes after a kill."""
    layout = recipe.layout()

    def make(folder: Path) -> Mapping[str, Any]:
        from nvlm_deploy.llm.trtllm import TrtllmExport

        export = TrtllmExport(recipe.checkpoint, layout, _calibration(recipe))
        export.write(folder, recipe.on_progress)
        return export.notes

    settings = recipe.profile.decoder.model_dump(
        include={"quantization", "kv_cache", "tensor_parallel", "pipeline_parallel"}
    )
    tools = ("torch", "safetensors")
    return Step("quantize-llm", recipe.decoder_folder, _sources(recipe), settings, make, tools, resumes=True)


def export_hf(recipe: Recipe) -> Step:
    """The whole model as a Hugging Face folder for engines that know NVLM-D; resumes after a kill."""
    choice = recipe.profile.decoder
    layout = layout_for(
        recipe.checkpoint, recipe.spec, QUANT_ALGOS[choice.quantization], KV_CACHE_QUANT_ALGOS[choice.kv_cache]
    )

    def make(folder: Path) -> Mapping[str, Any]:
        from nvlm_deploy.llm.hf_checkpoint import HfExport

        export = HfExport(recipe.checkpoint, layout, _calibration(recipe))
        export.write(folder, recipe.on_progress)
        return export.notes

    companions = {path.name: path for path in companions_of(recipe.checkpoint_folder)}
    settings = choice.model_dump(include={"quantization", "kv_cache"})
    tools = ("torch", "safetensors")
    return Step("export-hf", recipe.hf_folder, companions | _sources(recipe), settings, make, tools, resumes=True)


def build_llm(recipe: Recipe) -> Step:
    """Every rank's engine by NVIDIA's trtllm-build; ranks that a killed run finished are kept."""
    require_engines(recipe)
    settings = {
        "sku": load_sku(recipe.profile.sku).build_facts,
        "limits": vars(engine_settings(recipe).limits),
    }

    def make(folder: Path) -> Mapping[str, Any]:
        from nvlm_deploy.llm.engine import engines_from_checkpoint

        return engines_from_checkpoint(recipe.decoder_folder, folder, engine_settings(recipe)).notes

    layout, sku = recipe.layout(), load_sku(recipe.profile.sku)
    return Step(
        "build-llm",
        recipe.decoder_engine_folder,
        {"decoder": recipe.decoder_folder},
        settings,
        make,
        ("tensorrt_llm",),
        resumes=True,
        bound_to=partial(
            built_here,
            TENSORRT_LLM,
            compute_capability=sku.compute_capability,
            gpus=layout.parallelism.world_size,
        ),
    )


def require_engines(recipe: Recipe) -> None:
    """Refuse engines of another runtime, or that the profile's GPU could not run. Needs no container."""
    from nvlm_deploy.llm.engine import plan_engines

    profile = recipe.profile
    if profile.decoder.runtime != TENSORRT_LLM:
        raise NvlmError(
            f"profile {profile.name!r} runs its decoder on {profile.decoder.runtime!r}, which has no engines",
            hint=f'set runtime = "{TENSORRT_LLM}" below [decoder]',
        )
    settings = engine_settings(recipe)
    plan_engines(recipe.layout(), settings.sku, settings.limits)


def require_engine_builder() -> None:
    """Raises MachineError where no trtllm-build of a version that we know is installed."""
    from nvlm_deploy.llm.engine_tool import installed_tool

    installed_tool()


def require_calibration(recipe: Recipe) -> None:
    """Refuse a calibration that nothing would be made of, or without samples."""
    require_scales(recipe)
    if not recipe.calibrates_decoder:
        why = "it is data-free" if recipe.profile.decoder.wants_samples else "no scale depends on samples"
        raise NvlmError(
            f"profile {recipe.profile.name!r} needs no calibration of its decoder: {why}",
            hint="go on with `nvlm quantize-llm`",
        )
    ServedPrompts(recipe.prompts(), recipe.spec, recipe.profile).require(recipe.placed_samples())


def require_scales(recipe: Recipe) -> None:
    """Refuse static scales without samples to take them from."""
    profile = recipe.profile
    if profile.decoder.quantization == "fp8" and not recipe.calibrates_decoder:
        raise NvlmError(
            f"profile {profile.name!r} wants static fp8 scales with calibration.samples = 0: an input's scale cannot "
            "be known from weights",
            hint='give it samples, or choose quantization = "fp8_per_channel", which needs none',
        )


def engine_settings(recipe: Recipe) -> EngineSettings:
    """What the profile asks of trtllm-build."""
    from nvlm_deploy.llm.engine import EngineSettings
    from nvlm_deploy.llm.engine_arguments import engine_limits

    decoder = recipe.profile.decoder
    limits = engine_limits(
        recipe.spec.tiling,
        max_batch_size=decoder.max_batch_size,
        max_seq_len=decoder.max_seq_len,
        max_images=recipe.profile.serving.max_images,
        max_num_tokens=decoder.max_num_tokens,
    )
    return EngineSettings(load_sku(recipe.profile.sku), limits, recipe.builder_cache, decoder.build_at_once)


def _sources(recipe: Recipe) -> dict[str, Path]:
    calibration = {"calibration": recipe.calibration_result_folder} if recipe.calibrates_decoder else {}
    return recipe.checkpoint_inputs() | calibration


def _calibration(recipe: Recipe) -> CalibrationResult | None:
    from nvlm_deploy.llm.calibrate import CalibrationResult

    if not recipe.calibrates_decoder:
        return None
    return CalibrationResult.load(recipe.calibration_result_folder / RESULT_NAME)


def _digests(inputs: Mapping[str, Path]) -> dict[str, str]:
    return {name: digest_of_input(path) for name, path in inputs.items()}


def _embeddings(recipe: Recipe, work_folder: Path) -> Iterator[torch.Tensor]:
    """Of prompts and answers, in the checkpoint's type as the served decoder gets them; made only when asked for."""
    from nvlm_deploy.sample_embeddings import CachedEncoder, SampleEmbedder

    encode = CachedEncoder(encoder_without_gpu(recipe, work_folder / "graph"), work_folder / "embeddings")
    table = recipe.checkpoint.tensor(EMBEDDING_TABLE)
    reading = recipe.profile.serving.image_reading
    embedder = SampleEmbedder(recipe.prompts(), recipe.spec.tiling, encode, table, reading)
    samples = recipe.placed_samples()
    require_whole_pictures(samples, reading)
    for place, sample in samples:
        with blamed_on(place):
            yield embedder.prompt_and_answer(sample)
