"""How a checkpoint's config.json is read and written back (contract A.2 to A.4)."""

from __future__ import annotations

import copy
import dataclasses
import json


@dataclasses.dataclass
class Mapping:
    """An unknown key is a TypeError."""

    world_size: int = 1
    rank: int = 0
    gpus_per_node: int = 8
    cp_size: int = 1
    tp_size: int = 1
    pp_size: int = 1
    moe_tp_size: int = -1
    moe_ep_size: int = -1
    auto_parallel: bool = False

    def __post_init__(self):
        if self.world_size != self.tp_size * self.pp_size * self.cp_size:
            raise ValueError(f"world_size must equal to tp_size * pp_size * cp_size, but got {self.world_size}")


@dataclasses.dataclass
class QuantConfig:
    """An unknown key is a TypeError."""

    quant_algo: str | None = None
    kv_cache_quant_algo: str | None = None
    group_size: int = 128
    smoothquant_val: float = 0.5
    clamp_val: list | None = None
    use_meta_recipe: bool = False
    has_zero_point: bool = False
    pre_quant_scale: bool = False
    exclude_modules: list | None = None


DEFAULTS = {
    "vocab_size": None,
    "hidden_act": "gelu",
    "logits_dtype": "float32",
    "norm_epsilon": 1e-5,
    "position_embedding_type": "learned_absolute",
    "max_position_embeddings": None,
    "use_parallel_embedding": False,
    "embedding_sharding_dim": 0,
    "qk_layernorm": False,
    "mlp_bias": False,
    "attn_bias": True,
    "rotary_base": 10000.0,
    "rotary_scaling": None,
    "disable_weight_only_quant_plugin": False,
    "use_logn_attn": False,
    "num_labels": 1,
}
REQUIRED = ("architecture", "dtype", "hidden_size", "num_hidden_layers", "num_attention_heads")


class PretrainedConfig:
    """Keys nobody asked for become attributes, with a warning."""

    def __init__(self, **given):
        for key in REQUIRED:
            if key not in given:
                raise TypeError(f"__init__() missing 1 required keyword-only argument: '{key}'")
        values = {**DEFAULTS, **given}
        heads, hidden = values["num_attention_heads"], values["hidden_size"]
        values.setdefault("num_key_value_heads", heads)
        values.setdefault("head_size", hidden // heads)
        values.setdefault("rotary_embedding_dim", values["head_size"])
        values.setdefault("intermediate_size", 4 * hidden)
        values["mapping"] = Mapping(**(values.get("mapping") or {}))
        values["quantization"] = QuantConfig(**(values.get("quantization") or {}))
        values["moe"] = values.get("moe") or {"num_experts": 0, "top_k": 0}
        self.__dict__.update(values)

    @classmethod
    def from_dict(cls, config):
        from . import MODEL_MAP

        MODEL_MAP[config["architecture"]]  # a KeyError for an architecture that is not there
        return QWenConfig(**config)

    @classmethod
    def from_json_file(cls, path):
        with open(path) as file:  # noqa: PTH123
            return cls.from_dict(json.load(file))

    def set_rank(self, rank):
        self.mapping.rank = rank

    def to_dict(self):
        output = copy.deepcopy(self.__dict__)
        output["mapping"] = dataclasses.asdict(self.mapping)
        output["mapping"].pop("rank")
        output["quantization"] = dataclasses.asdict(self.quantization)
        return output


class QWenConfig(PretrainedConfig):
    pass
