"""The small model's folder: the released checkpoint's file names, tensor names, config keys and quirks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvlm_deploy.checkpoint.writer import write_shards
from nvlm_deploy.model.spec import ModelSpec, VisionSpec, spec_from_config
from tokenizer import build_tokenizer, write_tokenizer

if TYPE_CHECKING:  # config() is for tests without torch too
    import torch

DUMMY_HEADS = 7
MAX_SHARD_BYTES = 2_800_000


def config() -> dict[str, Any]:
    """config.json; `model_type` is `llama` for a Qwen2 decoder, as in the release."""
    ids = build_tokenizer()
    return {
        "architectures": ["NVLM_D"],
        "auto_map": {
            "AutoConfig": "configuration_nvlm_d.NVLM_D_Config",
            "AutoModel": "modeling_nvlm_d.NVLM_D_Model",
            "AutoModelForCausalLM": "modeling_nvlm_d.NVLM_D_Model",
        },
        "model_type": "NVLM_D",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": 56,
        "max_dynamic_patch": 6,
        "min_dynamic_patch": 1,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "chatml",
        "torch_dtype": "bfloat16",
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": True,
        "llm_config": {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "llama",
            "attention_bias": True,
            "attention_dropout": 0.0,
            "bos_token_id": ids.token_to_id("<|endoftext|>"),
            "eos_token_id": ids.token_to_id("<|im_end|>"),
            "do_sample": False,
            "hidden_act": "silu",
            "hidden_size": 256,
            "initializer_range": 0.02,
            "intermediate_size": 384,
            "max_length": 20,
            "max_position_embeddings": 2048,
            "mlp_bias": False,
            "num_attention_heads": 8,
            "num_hidden_layers": 4,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "vocab_size": 512,
        },
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            "attention_dropout": 0.0,
            "drop_path_rate": 0.0,
            "dropout": 0.0,
            "hidden_act": "gelu",
            "hidden_size": 128,
            "image_size": 56,
            "initializer_factor": 0.1,
            "initializer_range": 1e-10,
            "intermediate_size": 512,
            "layer_norm_eps": 1e-6,
            "norm_type": "rms_norm",
            "num_attention_heads": 4,
            "num_channels": 3,
            "num_hidden_layers": 4,
            "patch_size": 14,
            "qk_normalization": True,
            "qkv_bias": False,
            "torch_dtype": "bfloat16",
            "use_flash_attn": True,
        },
    }


def spec(padded_heads: int | None = None) -> ModelSpec:
    """The small model's spec; training works on the real heads alone (`padded_heads=4`)."""
    return spec_from_config(config(), padded_heads=padded_heads)


def write_folder(folder: Path, vision: Mapping[str, torch.Tensor], decoder: Mapping[str, torch.Tensor]) -> None:
    """The whole checkpoint folder in BF16 from unpadded vision weights and decoder weights."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = list(_released_tensors(vision, decoder))
    for old in folder.glob("model-*.safetensors"):
        old.unlink()
    write_shards(folder, tensors, max_shard_bytes=MAX_SHARD_BYTES)
    write_tokenizer(folder / "tokenizer.json")
    for name, document in _documents().items():
        (folder / name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    (folder / "configuration_nvlm_d.py").write_text(CONFIGURATION, encoding="utf-8")


def _released_tensors(
    vision: Mapping[str, torch.Tensor], decoder: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    shapes = spec().vision
    for name, tensor in decoder.items():
        yield f"language_model.{name}", tensor.detach().bfloat16()
    for name, tensor in vision.items():
        yield name, with_dummy_heads(name, tensor.detach(), shapes).bfloat16()


def with_dummy_heads(name: str, tensor: torch.Tensor, shapes: VisionSpec) -> torch.Tensor:
    """Zero rows and columns for the dummy heads, trailing in each of q, k and v as in the release."""
    import torch

    missing = DUMMY_HEADS * shapes.head_size
    if name.endswith("attn.qkv.weight"):
        parts = [torch.nn.functional.pad(part, (0, 0, 0, missing)) for part in tensor.chunk(3)]
        return torch.cat(parts)
    if name.endswith(("attn.q_norm.weight", "attn.k_norm.weight", "attn.proj.weight")):
        return torch.nn.functional.pad(tensor, (0, missing))
    return tensor


def without_dummy_heads(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """What with_dummy_heads was given."""
    import torch

    width = spec().vision.hidden_size
    if name.endswith("attn.qkv.weight"):
        return torch.cat([part[:width] for part in tensor.chunk(3)])
    if name.endswith(("attn.q_norm.weight", "attn.k_norm.weight", "attn.proj.weight")):
        return tensor[..., :width]
    return tensor


def _documents() -> dict[str, dict[str, Any]]:
    end, pad = config()["llm_config"]["eos_token_id"], config()["llm_config"]["bos_token_id"]
    generation = {"do_sample": False, "eos_token_id": end, "pad_token_id": pad, "bos_token_id": pad}
    preprocessor = {
        "crop_size": 56,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 3,
        "size": 56,
    }
    tokenizer = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 2048,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }
    return {
        "config.json": config(),
        "generation_config.json": generation,
        "preprocessor_config.json": preprocessor,
        "tokenizer_config.json": tokenizer,
    }


CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nAnswer the questions.<|im_end|>{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

CONFIGURATION = '''"""What `auto_map` in config.json points to, cut down to what a reader of this folder needs."""

from transformers import PretrainedConfig, Qwen2Config


class NVLM_D_Config(PretrainedConfig):  # noqa: N801
    model_type = "NVLM_D"
    has_no_defaults_at_init = True

    def __init__(self, vision_config=None, llm_config=None, **kwargs):
        # Before super().__init__: it already asks for the text config. The file says "llama" for a Qwen2 model.
        qwen2 = {key: value for key, value in (llm_config or {}).items() if key != "model_type"}
        self.llm_config = self.text_config = Qwen2Config(**qwen2)
        self.vision_config = PretrainedConfig(**{"norm_type": "rms_norm", **(vision_config or {})})
        super().__init__(**kwargs)
'''
