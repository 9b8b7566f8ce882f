"""The models' configs, the ensemble's wiring, and the cross-check that finds what is wrong with one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nvlm_deploy import tensors
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.image_file.limits import ImageLimits
from nvlm_deploy.image_file.reading import ImageReading
from nvlm_deploy.triton.choices import EngineChoices, ServingChoices
from nvlm_deploy.triton.decoder import DECODER
from nvlm_deploy.triton.ensemble import (
    ENSEMBLE,
    POSTPROCESSING,
    PREPROCESSING,
    TEXT_DECODER,
    VISION,
    ensemble_configs,
)
from nvlm_deploy.triton.pbtxt import ModelConfig, TensorConfig
from nvlm_deploy.triton.wiring import require_wired


@pytest.fixture
def configs(tiny_spec) -> dict[str, ModelConfig]:
    made = ensemble_configs(tiny_spec, ServingChoices(max_batch_size=4), vision_digest="0" * 64)
    return {config.name: config for config in made}


def test_there_are_five_models_of_which_two_are_decoupled_and_the_decoder_batches(configs) -> None:
    assert set(configs) == {ENSEMBLE, PREPROCESSING, VISION, DECODER, POSTPROCESSING}
    assert {name for name, config in configs.items() if config.decoupled} == {PREPROCESSING, DECODER}
    assert {name: config.max_batch_size for name, config in configs.items() if config.max_batch_size} == {DECODER: 4}


def test_the_decoder_has_the_cpp_backends_whole_interface(configs) -> None:
    """Names of contract C.3, and ours for text; only two inputs are required."""
    decoder = configs[DECODER]
    assert {tensor.name for tensor in decoder.inputs} - {s.name for s in tensors.DECODER_INPUTS} == {"stop_texts"}
    further = {tensor.name for tensor in decoder.outputs} - {spec.name for spec in tensors.DECODER_OUTPUTS}
    assert further == {"text_output", "finish_reason", "request_key"}
    assert (len(decoder.inputs), len(decoder.outputs)) == (62 + 1, 21 + 3)
    assert [tensor.name for tensor in decoder.inputs if not tensor.optional] == ["input_lengths", "request_output_len"]
    assert decoder.tensor("prompt_embedding_table") == TensorConfig(
        "prompt_embedding_table", "TYPE_BF16", (-1, 256), optional=True, ragged=True
    )


def test_the_ensembles_inputs_are_what_a_client_may_send(configs) -> None:
    ensemble = configs[ENSEMBLE]
    assert [tensor.name for tensor in ensemble.inputs if not tensor.optional] == ["text_input"]
    assert {tensor.name for tensor in ensemble.inputs} == {spec.name for spec in tensors.REQUEST_INPUTS}


def test_postprocessing_reads_nothing_but_the_decoder(configs) -> None:
    (step,) = [step for step in configs[ENSEMBLE].steps if step.model == POSTPROCESSING]
    assert {name.split(".")[0] for _, name in step.inputs} == {DECODER}


def test_the_order_of_the_pieces_is_kept(configs) -> None:
    """Triton promises it for a decoupled model, and for one instance without a dynamic batcher."""
    assert configs[DECODER].decoupled
    assert (configs[POSTPROCESSING].instances, configs[POSTPROCESSING].batching) == (1, None)


def test_in_front_of_tensorrt_llm_a_model_makes_text_of_tokens(tiny_spec) -> None:
    engines = EngineChoices(kv_tokens=100, kv_share_of_free=0.9)
    made = ensemble_configs(tiny_spec, ServingChoices(engines=engines), vision_digest="0" * 64)
    configs = {config.name: config for config in made}
    assert [step.model for step in configs[ENSEMBLE].steps] == [PREPROCESSING, VISION, TEXT_DECODER, POSTPROCESSING]
    assert (len(configs[DECODER].inputs), len(configs[DECODER].outputs)) == (62, 21)
    assert configs[TEXT_DECODER].decoupled


def test_preprocessing_has_threads_of_its_own_number(tiny_spec) -> None:
    choices = ServingChoices(threads=1, preprocessing_threads=6)
    configs = {config.name: config for config in ensemble_configs(tiny_spec, choices, vision_digest="0" * 64)}
    assert dict(configs[PREPROCESSING].parameters)["threads"] == "6"
    assert dict(configs[VISION].parameters)["threads"] == "1"


def test_preprocessing_reads_images_as_the_profile_chose(tiny_spec) -> None:
    reading = ImageReading("reference", "#102030", ImageLimits(5, 6, 7))
    made = ensemble_configs(tiny_spec, ServingChoices(images=reading), vision_digest="0" * 64)
    parameters = dict(next(config for config in made if config.name == PREPROCESSING).parameters)
    found = ImageReading.from_parameters(lambda key: parameters[key], lambda key: int(parameters[key]))
    assert found == reading


def test_no_parameter_holds_a_path(configs) -> None:
    assert not [value for config in configs.values() for _, value in config.parameters if "/" in value]


def replaced(configs, name: str, **changes) -> list[ModelConfig]:
    return [replace(config, **changes) if config.name == name else config for config in configs.values()]


def without(tensors_: tuple[TensorConfig, ...], name: str) -> tuple[TensorConfig, ...]:
    return tuple(tensor for tensor in tensors_ if tensor.name != name)


def changed(tensors_: tuple[TensorConfig, ...], name: str, **changes) -> tuple[TensorConfig, ...]:
    return tuple(replace(tensor, **changes) if tensor.name == name else tensor for tensor in tensors_)


def test_a_missing_model_is_found(configs) -> None:
    rest = [config for config in configs.values() if config.name != VISION]
    with pytest.raises(NvlmError, match="there is no model vision_encoder"):
        require_wired(rest)


def test_a_tensor_that_the_producer_lacks_is_found(configs) -> None:
    outputs = without(configs[PREPROCESSING].outputs, "seed")
    with pytest.raises(NvlmError, match="preprocessing has no output seed"):
        require_wired(replaced(configs, PREPROCESSING, outputs=outputs))


def test_a_tensor_that_the_consumer_lacks_is_found(configs) -> None:
    inputs = without(configs[DECODER].inputs, "prompt_vocab_size")
    with pytest.raises(NvlmError, match="tensorrt_llm has no input prompt_vocab_size"):
        require_wired(replaced(configs, DECODER, inputs=inputs))


def test_another_element_type_is_found(configs) -> None:
    outputs = changed(configs[VISION].outputs, "prompt_embedding_table", data_type="TYPE_FP16")
    with pytest.raises(NvlmError, match="output prompt_embedding_table is TYPE_FP16, tensorrt_llm input"):
        require_wired(replaced(configs, VISION, outputs=outputs))


def test_another_size_is_found_with_the_batch_axis_counted(configs) -> None:
    outputs = changed(configs[VISION].outputs, "prompt_embedding_table", dims=(1, -1, 8192))
    with pytest.raises(NvlmError, match=r"dims \[1, -1, 8192\], tensorrt_llm input .* \[-1, -1, 256\]"):
        require_wired(replaced(configs, VISION, outputs=outputs))


def test_a_missing_axis_is_found(configs) -> None:
    outputs = changed(configs[PREPROCESSING].outputs, "prompt_table_extra_ids", dims=(-1,))
    with pytest.raises(NvlmError, match=r"output prompt_table_extra_ids has dims \[-1\]"):
        require_wired(replaced(configs, PREPROCESSING, outputs=outputs))


def test_a_required_input_that_may_be_left_out_is_found(configs) -> None:
    inputs = changed(configs[PREPROCESSING].inputs, "image", optional=False)
    with pytest.raises(NvlmError, match="nvlm input image may be left out, preprocessing input image is required"):
        require_wired(replaced(configs, PREPROCESSING, inputs=inputs))


def with_step(configs, model: str, **changes) -> list[ModelConfig]:
    steps = tuple(replace(step, **changes) if step.model == model else step for step in configs[ENSEMBLE].steps)
    return replaced(configs, ENSEMBLE, steps=steps)


def test_a_required_input_that_is_not_mapped_is_found(configs) -> None:
    with pytest.raises(NvlmError, match="vision_encoder input tiles is required and not mapped"):
        require_wired(with_step(configs, VISION, inputs=()))


def test_a_wire_from_nowhere_is_found(configs) -> None:
    with pytest.raises(NvlmError, match="reads ensemble tensor tilse, which nothing makes"):
        require_wired(with_step(configs, VISION, inputs=(("tiles", "tilse"),)))


def test_a_tensor_made_twice_is_found(configs) -> None:
    outputs = (("prompt_embedding_table", "vision_encoder.x"), ("prompt_vocab_size", "preprocessing.tiles"))
    with pytest.raises(NvlmError, match=r"preprocessing\.tiles is made more than once"):
        require_wired(with_step(configs, VISION, outputs=outputs))
