"""The tensors of a Qwen2 rank by contract A.5, A.8 and A.9, written down once more: not taken from our own layout."""

from __future__ import annotations

import dataclasses

import tensorrt as trt


@dataclasses.dataclass
class Parameter:
    shape: tuple
    dtype: trt.DataType
    inited: bool = False

    def is_inited(self):
        return self.inited


class QWenForCausalLM:
    def __init__(self, config):
        config.qwen_type, config.seq_length  # noqa: B018  # read without a default (issue 3105)
        self.config = config

    def named_parameters(self):
        config, mapping = self.config, self.config.mapping
        tensor, stage = mapping.tp_size, mapping.rank // mapping.tp_size
        rows = -(-config.vocab_size // tensor)
        if stage == 0:
            embedding = rows if config.use_parallel_embedding else config.vocab_size
            yield "transformer.vocab_embedding.weight", Parameter((embedding, config.hidden_size), trt.DataType.BF16)
        for layer in range(stage_layers(config.num_hidden_layers, mapping.pp_size, stage)):
            for name, shape, dtype in layer_parameters(config, tensor):
                yield f"transformer.layers.{layer}.{name}", Parameter(shape, dtype)
        if stage == mapping.pp_size - 1:
            yield "transformer.ln_f.weight", Parameter((config.hidden_size,), trt.DataType.BF16)
            yield "lm_head.weight", Parameter((rows, config.hidden_size), trt.DataType.BF16)
        yield "transformer.rope_table", Parameter((1, 8), trt.DataType.FLOAT, inited=True)


def stage_layers(layers, stages, stage):
    return layers // stages + (stage < layers % stages)


def layer_parameters(config, tensor):
    hidden, head = config.hidden_size, config.head_size
    queries = config.num_attention_heads * head // tensor
    keys = (config.num_key_value_heads + tensor - 1) // tensor * head
    inner, fused = config.intermediate_size // tensor, queries + 2 * keys
    algo, bf16 = config.quantization.quant_algo, trt.DataType.BF16
    yield "input_layernorm.weight", (hidden,), bf16
    yield "post_layernorm.weight", (hidden,), bf16
    if config.attn_bias:
        yield "attention.qkv.bias", (fused,), bf16
    linears = {
        "attention.qkv": (fused, hidden),
        "attention.dense": (hidden, queries),
        "mlp.fc": (inner, hidden),
        "mlp.gate": (inner, hidden),
        "mlp.proj": (hidden, inner),
    }
    for name, shape in linears.items():
        yield f"{name}.weight", shape, bf16 if algo is None else trt.DataType.FP8
        if algo == "FP8":
            yield f"{name}.weights_scaling_factor", (1,), trt.DataType.FLOAT
            yield f"{name}.activation_scaling_factor", (1,), trt.DataType.FLOAT
        elif algo == "FP8_PER_CHANNEL_PER_TOKEN":
            yield f"{name}.per_channel_scale", shape[:1], trt.DataType.FLOAT
        elif algo is not None:
            raise ValueError(f"the fake knows no {algo}")
    if config.quantization.kv_cache_quant_algo is not None:
        yield "attention.kv_cache_scaling_factor", (1,), trt.DataType.FLOAT
        yield "attention.kv_cache_rcp_scaling_factor", (1,), trt.DataType.FLOAT
