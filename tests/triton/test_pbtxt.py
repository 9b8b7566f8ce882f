"""Configs as data: what is written is what is parsed, and nothing unresolved is written."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.tensors import TensorSpec
from nvlm_deploy.triton.pbtxt import (
    DynamicBatching,
    EnsembleStep,
    ModelConfig,
    TensorConfig,
    config_from_text,
    config_text,
    text_parameters,
)

CONFIG = ModelConfig(
    name="decoder",
    backend="python",
    max_batch_size=8,
    inputs=(
        TensorConfig("ids", "TYPE_INT32", (-1,), optional=True, ragged=True),
        TensorConfig("length", "TYPE_INT32", (1,), reshape=()),
    ),
    outputs=(TensorConfig("table", "TYPE_BF16", (1, -1, 256)),),
    parameters=(("limit", "512"), ("wrapper", "chat")),
    instances=2,
    decoupled=True,
    batching=DynamicBatching(max_queue_delay_us=100, max_queue_size=64, preferred=(4, 8)),
    left_empty=("guide",),
)
ENSEMBLE = ModelConfig(
    name="all",
    backend="",
    max_batch_size=0,
    inputs=(TensorConfig("a", "TYPE_STRING", (1,)),),
    outputs=(TensorConfig("b", "TYPE_STRING", (1,)),),
    steps=(EnsembleStep("one", (("x", "a"),), (("y", "b"),)),),
)


@pytest.mark.parametrize("config", [CONFIG, ENSEMBLE, replace(CONFIG, batching=None, decoupled=False)])
def test_a_config_survives_the_way_through_the_protobuf(config) -> None:
    assert config_from_text(config_text(config), origin="test") == config


def test_the_text_is_tritons_own_format() -> None:
    text = config_text(CONFIG)
    assert 'name: "decoder"' in text
    assert "data_type: TYPE_BF16" in text
    assert "decoupled: true" in text
    assert "allow_ragged_batch: true" in text
    assert "reshape {" in text, "an empty shape is there, not left out"
    assert 'key: "guide"' in text


def test_an_ensemble_has_a_platform_and_no_instances() -> None:
    text = config_text(ENSEMBLE)
    assert 'platform: "ensemble"' in text
    assert "instance_group" not in text


@pytest.mark.parametrize("value", ["", "${engine_dir}", "None"])
def test_a_parameter_without_a_final_value_is_refused_by_name(value) -> None:
    with pytest.raises(NvlmError, match="decoder: parameter engine has no final value"):
        config_text(replace(CONFIG, parameters=(("engine", value),)))


def test_what_the_text_cannot_carry_is_noticed() -> None:
    unsorted = replace(CONFIG, parameters=(("b", "1"), ("a", "2")))
    with pytest.raises(NvlmError, match="round trip"):
        config_text(unsorted)


def test_a_damaged_file_is_named() -> None:
    with pytest.raises(NvlmError, match=r"repo/config\.pbtxt: not a valid"):
        config_from_text('name: "x" backends: 3', origin="repo/config.pbtxt")


def test_a_spec_becomes_a_tensor_with_named_axes_free() -> None:
    spec = TensorSpec("tiles", "uint8", ("tiles", "height", "width", 3), optional=True).with_axes(height=56, width=56)
    assert TensorConfig.from_spec(spec) == TensorConfig("tiles", "TYPE_UINT8", (-1, 56, 56, 3), optional=True)


def test_parameters_are_sorted_and_switches_in_small_letters() -> None:
    assert text_parameters({"b": True, "a": 3, "c": "x"}) == (("a", "3"), ("b", "true"), ("c", "x"))
