"""The released model by its config.json, for whoever has no checkpoint at hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# config.json of nvidia/NVLM-D-72B as far as it is published; facts nvlm-d.md section 1
NVLM_D_72B: Mapping[str, Any] = {
    "architectures": ["NVLM_D"],
    "downsample_ratio": 0.5,
    "dynamic_image_size": True,
    "force_image_size": 448,
    "max_dynamic_patch": 6,
    "min_dynamic_patch": 1,
    "ps_version": "v2",
    "select_layer": -1,
    "use_thumbnail": True,
    "llm_config": {
        "architectures": ["Qwen2ForCausalLM"],
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "max_position_embeddings": 32768,
        "num_attention_heads": 64,
        "num_hidden_layers": 80,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": False,
        "vocab_size": 152064,
    },
    "vision_config": {
        "hidden_act": "gelu",
        "hidden_size": 3200,
        "image_size": 448,
        "intermediate_size": 12800,
        "layer_norm_eps": 1e-6,
        "norm_type": "rms_norm",
        "num_attention_heads": 25,
        "num_hidden_layers": 45,
        "patch_size": 14,
        "qk_normalization": True,
        "qkv_bias": False,
    },
}
