"""Odd values in config.json are wrong input, named by key; none is taken silently."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nvlm_deploy.checkpoint.reader import read_json
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.model.spec import spec_from_config


def edited(config: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    copy = json.loads(json.dumps(config))
    *sections, key = path.split(".")
    place = copy
    for section in sections:
        place = place[section]
    place[key] = value
    return copy


@pytest.mark.parametrize(
    ("path", "value", "word"),
    [
        ("architectures", 5, "architectures is 5"),
        ("architectures", None, "another model"),
        ("llm_config.architectures", 7, "llm_config.architectures is 7"),
        ("llm_config", [], "no section 'llm_config'"),
        ("vision_config.hidden_size", float("inf"), "hidden_size is inf"),
        ("vision_config.hidden_size", float("nan"), "hidden_size is nan"),
        ("vision_config.hidden_size", True, "hidden_size is True"),
        ("vision_config.num_attention_heads", 2.5, "whole number"),
        ("llm_config.rope_parameters", {"rope_theta": "abc"}, "rope_theta is 'abc'"),
        ("llm_config.rope_scaling", {"type": "yarn"}, "only plain RoPE"),
        ("llm_config.eos_token_id", 99999, "outside the vocabulary of 512"),
        ("llm_config.tie_word_embeddings", True, "output head of its own"),
        ("use_thumbnail", "false", "expected true or false"),
        ("quantization_config", {"quant_method": "gptq"}, "quantised already"),
        ("ps_version", "v1", "ps_version is 'v1'"),
        ("select_layer", -4, "select_layer is -4"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_by_name(
    tiny_config: dict[str, Any], path: str, value: object, word: str
) -> None:
    with pytest.raises(NvlmError, match=word.replace("[", r"\\[")):
        spec_from_config(edited(tiny_config, path, value), padded_heads=11)


def test_a_config_nested_without_end_is_not_json(tmp_path) -> None:
    (tmp_path / "config.json").write_text("[" * 200_000)
    with pytest.raises(NvlmError, match="is not JSON"):
        read_json(tmp_path / "config.json")
