"""quantize-llm: the decoder as a TensorRT-LLM checkpoint, its scales from samples with their pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvlm_deploy.pipeline import Step
from nvlm_deploy.recipe import Recipe

if TYPE_CHECKING:
    from nvlm_deploy.llm.calibrate import CalibrationResult

EMBEDDING_TABLE = "language_model.model.embed_tokens.weight"


def quantize_llm(recipe: Recipe) -> Step:
    """The checkpoint of every rank; without quantisation no samples are read."""
    choice = recipe.profile.decoder
    quantised = choice.quantization != "none"
    inputs = recipe.checkpoint_inputs()
    settings = choice.model_dump(include={"quantization", "kv_cache", "tensor_parallel", "pipeline_parallel"})
    if quantised:
        inputs |= {"vision": recipe.vision_engine_folder, **recipe.calibration_inputs()}
        settings |= {"calibration samples": len(recipe.samples()), "wrapper": recipe.profile.serving.wrapper}

    def make(folder: Path) -> Mapping[str, Any]:
        from nvlm_deploy.llm.trtllm import trtllm_checkpoint_from

        calibration = _calibrated(recipe) if quantised else None
        trtllm_checkpoint_from(
            recipe.checkpoint, recipe.spec, folder, calibration=calibration, parallelism=recipe.layout().parallelism
        )
        return {}

    return Step("quantize-llm", recipe.decoder_folder, inputs, settings, make, ("torch", "safetensors"))


def _calibrated(recipe: Recipe) -> CalibrationResult:
    """amax values of the decoder's linears over the samples, images through the built vision encoder."""
    from nvlm_deploy.llm.calibrate import calibrate
    from nvlm_deploy.sample_embeddings import SampleEmbedder
    from nvlm_deploy.vision.engine import OnnxRuntimeEngine

    encode = OnnxRuntimeEngine(recipe.vision_engine_folder / "vision.onnx")
    table = recipe.checkpoint.tensor(EMBEDDING_TABLE).float()
    embedder = SampleEmbedder(recipe.prompts(), recipe.spec.tiling, encode, table)
    embeddings = [embedder.prompt_and_answer(sample) for sample in recipe.samples()]
    return calibrate(recipe.checkpoint, recipe.spec, embeddings)
