"""The models of the ensemble `nvlm`: their configs, made from the tensors' own descriptions."""

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
TEXT_DECODER = "text_decoder"


def ensemble_configs(spec: ModelSpec, choices: ServingChoices, *, vision_digest: str) -> tuple[ModelConfig, ...]:
    """Return the configs of all models, cross-checked; `vision_digest` names the encoder in KV-cache keys.

    TensorRT-LLM's backend makes tokens; `text_decoder` in front of it makes text. The reference decoder does both.
    """
    text_decoder = () if choices.engines is None else (_text_decoder(spec, choices),)
    configs = (
        _preprocessing(spec, choices, vision_digest),
        _vision_encoder(spec, choices),
        decoder_config(spec, choices),
        *text_decoder,
        _postprocessing(),
        _ensemble(DECODER if choices.engines is None else TEXT_DECODER),
    )
    require_wired(configs)
    return configs


def _preprocessing(spec: ModelSpec, choices: ServingChoices, vision_digest: str) -> ModelConfig:
    """Several instances: Triton copies a request into an instance's memory first, and others pass meanwhile."""
    parameters = {
        "max_seq_len": choices.max_seq_len,
        "max_images": choices.max_images,
        "default_max_tokens": choices.default_max_tokens,
        "max_request_bytes": choices.max_request_bytes,
        "max_waiting_requests": choices.max_waiting_requests,
        "max_waiting_bytes": choices.max_waiting_bytes,
        **choices.images.parameters(),
        "prompt_wrapper": choices.prompt_wrapper,
        "vision_digest": vision_digest,
        "threads": choices.preprocessing_threads,
    }
    outputs = (_tiles(spec), *tensors.PREPARED_FOR_DECODER)
    config = _python_model(PREPROCESSING, tensors.REQUEST_INPUTS, outputs, parameters)
    return replace(config, decoupled=True, instances=choices.preprocessing_instances)


def _vision_encoder(spec: ModelSpec, choices: ServingChoices) -> ModelConfig:
    """Not decoupled: Triton refuses a step whose inputs come from two decoupled models, here the decoder's."""
    parameters = {
        "hidden_size": spec.decoder.hidden_size,
        "max_tiles_per_run": choices.max_tiles_per_run,
        "runtime": choices.vision_runtime,
        "threads": choices.threads,
    }
    outputs = tuple(output.with_axes(hidden=spec.decoder.hidden_size) for output in tensors.PROMPT_TABLE)
    return _python_model(VISION, (_tiles(spec),), outputs, parameters)


def _text_decoder(spec: ModelSpec, choices: ServingChoices) -> ModelConfig:
    table = tuple(tensor.with_axes(hidden=spec.decoder.hidden_size) for tensor in tensors.PROMPT_TABLE)
    parameters = {"max_batch_size": choices.max_batch_size, "FORCE_CPU_ONLY_INPUT_TENSORS": "no"}
    inputs = (*tensors.PREPARED_FOR_DECODER, *table)
    return replace(_python_model(TEXT_DECODER, inputs, tensors.MADE_OF_TOKENS, parameters), decoupled=True)


def _postprocessing() -> ModelConfig:
    """One instance without a batcher: only then does the ensemble promise to keep the order of the pieces."""
    return _python_model(POSTPROCESSING, tensors.MADE_OF_TOKENS, tensors.RESPONSE_OUTPUTS, {})


def _ensemble(decoder: str) -> ModelConfig:
    """An inner tensor is called `<model that makes it>.<its name>`; outer ones keep their names."""
    decoder_inputs = {
        **{spec.name: f"{PREPROCESSING}.{spec.name}" for spec in tensors.PREPARED_FOR_DECODER},
        **{spec.name: f"{VISION}.{spec.name}" for spec in tensors.PROMPT_TABLE},
    }
    prepared = (tensors.TILES, *tensors.PREPARED_FOR_DECODER)
    texts = _made_by(decoder, tensors.MADE_OF_TOKENS)
    steps = (
        _step(PREPROCESSING, _same_names(tensors.REQUEST_INPUTS), _made_by(PREPROCESSING, prepared)),
        _step(VISION, _made_by(PREPROCESSING, (tensors.TILES,)), _made_by(VISION, tensors.PROMPT_TABLE)),
        _step(decoder, decoder_inputs, texts),
        _step(POSTPROCESSING, texts, _same_names(tensors.RESPONSE_OUTPUTS)),
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
