"""The five models of the ensemble `nvlm`: their configs, made from the tensors' own descriptions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from nvlm_deploy import tensors
from nvlm_deploy.model.spec import ModelSpec
from nvlm_deploy.tensors import TensorSpec
from nvlm_deploy.triton.choices import ServingChoices
from nvlm_deploy.triton.decoder import DECODER, decoder_config
from nvlm_deploy.triton.pbtxt import EnsembleStep, ModelConfig, TensorConfig, text_parameters
from nvlm_deploy.triton.wiring import require_wired

ENSEMBLE, PREPROCESSING, VISION, POSTPROCESSING = "nvlm", "preprocessing", "vision_encoder", "postprocessing"


def ensemble_configs(spec: ModelSpec, choices: ServingChoices, *, vision_digest: str) -> tuple[ModelConfig, ...]:
    """The configs of all five models, cross-checked; `vision_digest` names the encoder in KV-cache keys."""
    configs = (
        _preprocessing(spec, choices, vision_digest),
        _vision_encoder(spec, choices),
        decoder_config(spec, choices),
        _postprocessing(spec),
        _ensemble(),
    )
    require_wired(configs)
    return configs


def _preprocessing(spec: ModelSpec, choices: ServingChoices, vision_digest: str) -> ModelConfig:
    parameters = {
        "max_seq_len": choices.max_seq_len,
        "max_images": choices.max_images,
        "default_max_tokens": choices.default_max_tokens,
        **choices.images.parameters(),
        "prompt_wrapper": choices.prompt_wrapper,
        "vision_digest": vision_digest,
        "threads": choices.preprocessing_threads,
    }
    outputs = (_tiles(spec), *tensors.PREPARED_FOR_DECODER)
    config = _python_model(PREPROCESSING, tensors.REQUEST_INPUTS, outputs, parameters)
    return replace(config, instances=choices.preprocessing_instances)


def _vision_encoder(spec: ModelSpec, choices: ServingChoices) -> ModelConfig:
    parameters = {
        "hidden_size": spec.decoder.hidden_size,
        "max_tiles_per_run": choices.max_tiles_per_run,
        "runtime": choices.vision_runtime,
        "threads": choices.threads,
    }
    outputs = tuple(output.with_axes(hidden=spec.decoder.hidden_size) for output in tensors.PROMPT_TABLE)
    return _python_model(VISION, (_tiles(spec),), outputs, parameters)


def _postprocessing(spec: ModelSpec) -> ModelConfig:
    """One instance without a batcher: only then does the ensemble promise to keep the order of the pieces."""
    parameters = {"end_id": spec.prompt.eos_token_id}
    return _python_model(POSTPROCESSING, tensors.DECODED, tensors.RESPONSE_OUTPUTS, parameters)


def _ensemble() -> ModelConfig:
    """An inner tensor is called `<model that makes it>.<its name>`; outer ones keep their names."""
    decoder_inputs = {
        **{spec.name: f"{PREPROCESSING}.{spec.name}" for spec in tensors.PREPARED_FOR_DECODER},
        **{spec.name: f"{VISION}.{spec.name}" for spec in tensors.PROMPT_TABLE},
    }
    prepared = (tensors.TILES, *tensors.PREPARED_FOR_DECODER)
    steps = (
        _step(PREPROCESSING, _same_names(tensors.REQUEST_INPUTS), _made_by(PREPROCESSING, prepared)),
        _step(VISION, _made_by(PREPROCESSING, (tensors.TILES,)), _made_by(VISION, tensors.PROMPT_TABLE)),
        _step(DECODER, decoder_inputs, _made_by(DECODER, tensors.DECODED)),
        _step(POSTPROCESSING, _made_by(DECODER, tensors.DECODED), _same_names(tensors.RESPONSE_OUTPUTS)),
    )
    inputs = tuple(TensorConfig.from_spec(spec) for spec in tensors.REQUEST_INPUTS)
    outputs = tuple(TensorConfig.from_spec(spec) for spec in tensors.RESPONSE_OUTPUTS)
    return ModelConfig(ENSEMBLE, "", 0, inputs, outputs, steps=steps)


def _python_model(
    name: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], parameters: Mapping[str, object]
) -> ModelConfig:
    """A model that takes one request at a time: tile counts vary, so requests are not joined by Triton."""
    return ModelConfig(
        name=name,
        backend="python",
        max_batch_size=0,
        inputs=tuple(TensorConfig.from_spec(spec) for spec in inputs),
        outputs=tuple(TensorConfig.from_spec(spec) for spec in outputs),
        parameters=text_parameters(parameters),
    )


def _tiles(spec: ModelSpec) -> TensorSpec:
    return tensors.TILES.with_axes(height=spec.tiling.tile_size, width=spec.tiling.tile_size)


def _step(model: str, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> EnsembleStep:
    return EnsembleStep(model, tuple(sorted(inputs.items())), tuple(sorted(outputs.items())))


def _same_names(specs: Sequence[TensorSpec]) -> dict[str, str]:
    return {spec.name: spec.name for spec in specs}


def _made_by(model: str, specs: Sequence[TensorSpec]) -> dict[str, str]:
    return {spec.name: f"{model}.{spec.name}" for spec in specs}
