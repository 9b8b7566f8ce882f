"""ModelSpec from config.json and headers: the released values, the small ones, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.model.spec import ModelSpec, spec_from_checkpoint, spec_from_config

# facts nvlm-d.md section 1; vocab_size and rope_theta are Qwen2-72B-Instruct's; keys of the encoder's and the tiling's
# whose literal values are not published are left out and must default right
RELEASED_CONFIG: dict[str, Any] = {
    "architectures": ["NVLM_D"],
    "model_type": "NVLM_D",
    "downsample_ratio": 0.5,
    "dynamic_image_size": True,
    "force_image_size": 448,
    "llm_config": {
        "_name_or_path": "Qwen/Qwen2-72B-Instruct",
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "llama",
        "attention_bias": True,
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_attention_heads": 64,
        "num_hidden_layers": 80,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "vocab_size": 152064,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    },
    "vision_config": {
        "model_type": "intern_vit_6b",
        "hidden_size": 3200,
        "num_hidden_layers": 45,
        "num_attention_heads": 25,
        "intermediate_size": 12800,
        "image_size": 448,
        "patch_size": 14,
        "layer_norm_eps": 1e-6,
        "qk_normalization": True,
        "qkv_bias": False,
    },
}


@pytest.fixture
def config() -> dict[str, Any]:
    return copy.deepcopy(RELEASED_CONFIG)


def parameter_count(spec: ModelSpec) -> tuple[int, int, int]:
    """Vision, projector, decoder."""
    import torch

    from nvlm_deploy.model.decoder import Decoder
    from nvlm_deploy.model.vision import VisionTower

    with torch.device("meta"):
        tower, decoder = VisionTower(spec.vision, spec.projector), Decoder(spec.decoder)
    parts = (tower.vision_model, tower.mlp1, decoder)
    vision, projector, text = (sum(weight.numel() for weight in part.parameters()) for part in parts)
    return vision, projector, text


def test_the_released_config_gives_the_released_shapes(config):
    spec = spec_from_config(config)
    assert (spec.vision.head_size, spec.vision.grid, spec.vision.positions) == (128, 32, 1025)
    assert (spec.projector.input_size, spec.projector.hidden_size, spec.projector.output_size) == (12800, 29568, 8192)
    assert (spec.decoder.head_size, spec.decoder.vocab_size, spec.decoder.rotary_base) == (128, 152064, 1e6)
    assert (spec.tiling.tokens_per_tile, spec.tiling.max_tiles_with_thumbnail) == (256, 7)


def test_trap_1_the_config_says_25_heads_and_the_weights_hold_32(config):
    spec = spec_from_config(config)
    assert (spec.vision.heads, spec.vision.padded_heads, spec.vision.attention_width) == (25, 32, 4096)


@pytest.mark.needs("build")
def test_trap_1_only_32_heads_give_the_published_parameter_count(config):
    padded, unpadded = (sum(parameter_count(spec_from_config(config, padded_heads=heads))) for heads in (32, 25))
    assert f"{padded / 1e9:.3f}" == "79.380"  # as the hub lists it
    assert f"{unpadded / 1e9:.3f}" == "78.863"


def test_trap_3_the_projector_takes_its_width_from_the_decoder_mlp(config):
    config["llm_config"]["intermediate_size"] = 29696
    assert spec_from_config(config).projector.hidden_size == 29696


def test_trap_4_a_decoder_that_calls_itself_llama_is_the_qwen2_it_is(config):
    assert config["llm_config"]["model_type"] == "llama"
    assert spec_from_config(config).decoder.kv_heads == 8


def test_trap_4_a_decoder_of_another_architecture_is_refused(config):
    config["llm_config"]["architectures"] = ["LlamaForCausalLM"]
    with pytest.raises(NvlmError, match=r"LlamaForCausalLM.*Qwen2ForCausalLM"):
        spec_from_config(config)


def test_trap_8_six_tiles_are_the_most_by_default_and_not_twelve(config):
    assert "max_dynamic_patch" not in config
    assert spec_from_config(config).tiling.max_tiles == 6


@pytest.mark.needs("build")
def test_trap_9_fp8_weights_alone_do_not_fit_one_80_gb_gpu(config):
    spec = spec_from_config(config)
    vision, projector, decoder = parameter_count(spec)
    kept = 2 * spec.decoder.vocab_size * spec.decoder.hidden_size  # embeddings and lm_head stay in BF16
    gib = (2 * (vision + projector + kept) + (decoder - kept)) / 2**30
    assert 82 < gib < 83
    assert gib * 2**30 > 80e9


def test_a_single_tile_model_when_images_are_not_tiled(config):
    config["dynamic_image_size"] = False
    assert spec_from_config(config).tiling.max_tiles_with_thumbnail == 1


def test_rope_theta_is_read_from_either_generation_of_transformers(config):
    config["llm_config"]["rope_theta"] = 500.0
    assert spec_from_config(config).decoder.rotary_base == 500.0
    config["llm_config"]["rope_parameters"] = {"rope_type": "default", "rope_theta": 700.0}
    assert spec_from_config(config).decoder.rotary_base == 700.0


def test_the_small_model_has_the_released_quirks(tiny_config, tiny_spec):
    assert tiny_config["architectures"] == ["NVLM_D"]
    assert tiny_config["llm_config"]["model_type"] == "llama"
    assert tiny_spec.vision.padded_heads - tiny_spec.vision.heads == 7
    assert tiny_spec.projector.hidden_size == tiny_spec.decoder.intermediate_size


def test_the_padded_head_count_is_read_from_the_weights(random_checkpoint):
    assert spec_from_checkpoint(random_checkpoint).vision.padded_heads == 11


@pytest.mark.parametrize("architectures", [["LlavaForConditionalGeneration"], [], None, ["Qwen2ForCausalLM"]])
def test_a_checkpoint_of_another_model_is_refused(config, architectures):
    config["architectures"] = architectures
    with pytest.raises(NvlmError, match="another model") as refusal:
        spec_from_config(config)
    assert "nvlm inspect" in (refusal.value.hint or "")


@pytest.mark.parametrize(
    ("section", "key", "value", "telling"),
    [
        ("vision_config", "num_attention_heads", 24, "hidden_size 3200 is not a multiple of num_attention_heads 24"),
        ("vision_config", "patch_size", 15, "image_size 448 is not a multiple of patch_size 15"),
        ("vision_config", "qk_normalization", False, "qk_normalization"),
        ("vision_config", "qkv_bias", True, "qkv_bias"),
        ("vision_config", "norm_type", "layer_norm", "norm_type is 'layer_norm'"),
        ("vision_config", "hidden_act", "quick_gelu", "hidden_act is 'quick_gelu'"),
        ("vision_config", "num_channels", 1, "num_channels is 1"),
        ("llm_config", "hidden_act", "gelu", "hidden_act is 'gelu'"),
        ("llm_config", "mlp_bias", True, "mlp_bias is True"),
        ("llm_config", "rope_parameters", {"rope_type": "yarn", "factor": 4}, "rope_type is 'yarn'"),
        ("llm_config", "use_sliding_window", True, "use_sliding_window is True"),
        ("llm_config", "head_dim", 64, "head_dim is 64"),
        ("vision_config", "hidden_size", None, r"vision_config\.hidden_size is None, expected a positive number"),
        ("llm_config", "hidden_size", "8192", r"llm_config\.hidden_size is '8192'"),
        ("llm_config", "num_hidden_layers", -1, r"llm_config\.num_hidden_layers is -1"),
        ("llm_config", "num_hidden_layers", True, r"llm_config\.num_hidden_layers is True"),
        ("llm_config", "num_hidden_layers", 1.5, "whole number"),
        ("llm_config", "num_key_value_heads", 7, "num_attention_heads 64 is not a multiple of num_key_value_heads 7"),
        ("llm_config", "rope_scaling", {"type": "yarn", "factor": 4}, "only plain RoPE"),
        ("", "ps_version", "v1", "ps_version is 'v1'"),
        ("", "select_layer", -2, "select_layer is -2"),
        ("", "downsample_ratio", 0.25, r"downsample_ratio is 0\.25"),
        ("", "force_image_size", 336, "force_image_size is 336"),
        ("", "min_dynamic_patch", 7, "min_dynamic_patch 7 exceeds max_dynamic_patch 6"),
    ],
)
def test_a_config_that_contradicts_the_model_or_itself_is_refused_by_key(config, section, key, value, telling):
    (config[section] if section else config)[key] = value
    with pytest.raises(NvlmError, match=telling):
        spec_from_config(config)


@pytest.mark.parametrize("section", ["vision_config", "llm_config"])
def test_a_missing_section_is_named(config, section):
    del config[section]
    with pytest.raises(NvlmError, match=section):
        spec_from_config(config)


def test_an_odd_number_of_patches_cannot_be_shuffled(config):
    config["force_image_size"] = config["vision_config"]["image_size"] = 14 * 31
    with pytest.raises(NvlmError, match="patches along a tile 31"):
        spec_from_config(config)


class Headers:
    """A checkpoint reduced to its settings, the id of `<|im_end|>` and one shape."""

    generation: Mapping[str, Any] = {}
    turn_end: int | None = None

    def __init__(self, config: Mapping[str, Any], shape: tuple[int, ...]) -> None:
        self.config, self._shape = config, shape

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shape

    def added_token_id(self, content: str) -> int | None:
        return self.turn_end


@pytest.mark.parametrize("shape", [(), (12288,), (12288, 3201), (12289, 3200), (3 * 24 * 128, 3200)])
def test_qkv_weights_that_contradict_the_config_are_refused_with_their_shape(config, shape):
    with pytest.raises(NvlmError, match=r"qkv\.weight has shape .*must be \[3 \* heads \* 128, 3200\]"):
        spec_from_checkpoint(Headers(config, shape))
