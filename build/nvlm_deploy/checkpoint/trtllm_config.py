"""config.json of a TensorRT-LLM checkpoint of a Qwen2 decoder (contract A.3, A.4). No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nvlm_deploy.checkpoint.trtllm_layout import Layout, Parallelism
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.model.spec import DecoderSpec

# only enters log-n attention scaling, which Qwen2 does not use, but the reader has no default (contract A.3)
SEQUENCE_LENGTH = 8192
_FIXED: dict[str, Any] = {
    "architecture": "Qwen2ForCausalLM",
    "dtype": "bfloat16",
    "logits_dtype": "float32",
    "hidden_act": "silu",
    "position_embedding_type": "rope_gpt_neox",
    "rotary_scaling": None,
    "qwen_type": "qwen2",
    "seq_length": SEQUENCE_LENGTH,
    "attn_bias": True,
    "mlp_bias": False,
    "use_logn_attn": False,
    "disable_weight_only_quant_plugin": False,
    "num_labels": 1,
    "qk_layernorm": False,
    "use_parallel_embedding": True,
    "embedding_sharding_dim": 0,
}


def config_from_layout(layout: Layout) -> dict[str, Any]:
    """Every key of contract A.3, because several of the reader's defaults are wrong for Qwen2."""
    return {**_FIXED, **_numbers(layout.spec), **_sections(layout)}


def layout_from_config(config: Mapping[str, Any]) -> Layout:
    """The layout that writes this config.json; unknown top-level keys are let through, as TensorRT-LLM's reader does.

    Raises NvlmError for a key of contract A.3 that is missing or has a value this project does not write.
    """
    try:
        mapping, quantization = config["mapping"], config["quantization"]
        parallelism = Parallelism(int(mapping["tp_size"]), int(mapping["pp_size"]))
        layout = Layout(
            _spec_from_config(config), quantization["quant_algo"], parallelism, quantization["kv_cache_quant_algo"]
        )
    except KeyError as missing:
        raise NvlmError(f"config.json has no key {missing}", hint="write the checkpoint again") from missing
    except (TypeError, ValueError) as problem:
        raise NvlmError(f"config.json is not of a TensorRT-LLM checkpoint: {problem}") from problem
    for key, expected in config_from_layout(layout).items():
        _require_equal(config, key, expected)
    return layout


def _require_equal(config: Mapping[str, Any], key: str, expected: object) -> None:
    if key not in config:
        raise NvlmError(f"config.json has no key {key!r}", hint="write the checkpoint again")
    if config[key] != expected:
        raise NvlmError(f"config.json: {key} is {config[key]!r}, expected {expected!r}")


def _numbers(spec: DecoderSpec) -> dict[str, Any]:
    return {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_size": spec.head_size,
        "intermediate_size": spec.intermediate_size,
        "norm_epsilon": spec.norm_epsilon,
        "max_position_embeddings": spec.max_positions,
        "rotary_base": spec.rotary_base,
        "rotary_embedding_dim": spec.head_size,
        "tie_word_embeddings": False,
    }


def _spec_from_config(config: Mapping[str, Any]) -> DecoderSpec:
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        if int(config[key]) < 1:
            raise NvlmError(f"config.json: {key} is {config[key]}, expected at least 1")
    return DecoderSpec(
        vocab_size=int(config["vocab_size"]),
        hidden_size=int(config["hidden_size"]),
        intermediate_size=int(config["intermediate_size"]),
        layers=int(config["num_hidden_layers"]),
        heads=int(config["num_attention_heads"]),
        kv_heads=int(config["num_key_value_heads"]),
        norm_epsilon=float(config["norm_epsilon"]),
        rotary_base=float(config["rotary_base"]),
        max_positions=int(config["max_position_embeddings"]),
    )


def _sections(layout: Layout) -> dict[str, Any]:
    """A list of excluded modules replaces TensorRT-LLM's own, so it must name lm_head (contract A.4).

    For FP8_PER_CHANNEL_PER_TOKEN its quantiser adds the final norm to any list by itself.
    """
    parallelism = layout.parallelism
    return {
        "mapping": {
            "world_size": parallelism.world_size,
            "tp_size": parallelism.tensor,
            "pp_size": parallelism.pipeline,
            "cp_size": 1,
            "gpus_per_node": 8,
        },
        "quantization": {
            "quant_algo": layout.quant_algo,
            "kv_cache_quant_algo": layout.kv_cache_quant_algo,
            "exclude_modules": ["lm_head"] if layout.quant_algo else None,
        },
    }
