"""Which tensors a checkpoint of a spec must hold, with which shapes; counted by part. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator

from nvlm_deploy.checkpoint.reader import Checkpoint
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.model.spec import DecoderSpec, ModelSpec, ProjectorSpec, VisionSpec

# what the exporters can read; the release is BF16 throughout
READABLE_DTYPES = ("BF16", "F16", "F32")

PARTS = {"vision_model": "vision_model.", "projector": "mlp1.", "language_model": "language_model."}

# made from the config again by who reads it; older exports of Qwen2 store it
DERIVED = ".rotary_emb.inv_freq"

Shape = tuple[int, ...]


def expected_tensors(spec: ModelSpec) -> dict[str, Shape]:
    """Every tensor name of the released layout with its shape (facts nvlm-d.md section 2)."""
    return vision_tensors(spec) | dict(_decoder(spec.decoder))


def vision_tensors(spec: ModelSpec) -> dict[str, Shape]:
    """Those of the encoder and the projector."""
    return dict([*_vision(spec.vision), *_projector(spec.projector)])


def require_tensors(checkpoint: Checkpoint, spec: ModelSpec) -> list[str]:
    """Names of no part of the model, which the checkpoint holds beyond the expected ones.

    Raises NvlmError for the first missing or misshapen tensor, and for one more than the config knows in a part: a
    layer or a bias left out would be another model.
    """
    expected = expected_tensors(spec)
    extra = sorted(set(checkpoint.names) - set(expected))
    strangers = [name for name in extra if name.startswith(tuple(PARTS.values())) and not name.endswith(DERIVED)]
    missing = [name for name in expected if name not in checkpoint.infos]
    if missing:
        unknown = f"; unknown there: {strangers[0]}" if strangers else ""
        raise NvlmError(
            f"{len(missing)} of {len(expected)} tensors missing in {checkpoint.folder}, first {missing[0]}{unknown}",
            hint="fetch the checkpoint's shards and index again, or check that it is NVLM-D",
        )
    for name, shape in expected.items():
        require_shape(checkpoint, name, shape)
        _require_dtype(checkpoint, name)
    if strangers:
        raise NvlmError(
            f"{checkpoint.folder} holds {len(strangers)} tensors that its config.json does not know, "
            f"first {strangers[0]}",
            hint="fetch config.json of this checkpoint again: its layers, biases or norms are not those of the weights",
        )
    return extra


def require_shape(checkpoint: Checkpoint, name: str, expected: Shape) -> None:
    info = checkpoint.info(name)
    if info.shape != expected:
        raise NvlmError(
            f"tensor {name} in {info.shard.name} has shape {list(info.shape)}, "
            f"expected {list(expected)} by config.json",
            hint=f"`nvlm inspect {checkpoint.folder}` compares config.json with the shards",
        )


def _require_dtype(checkpoint: Checkpoint, name: str) -> None:
    info = checkpoint.info(name)
    if info.dtype not in READABLE_DTYPES:
        raise NvlmError(
            f"tensor {name} in {info.shard.name} is {info.dtype}, expected one of {', '.join(READABLE_DTYPES)}",
            hint="start from the unquantised checkpoint",
        )


def sizes_by_part(checkpoint: Checkpoint) -> dict[str, dict[str, int]]:
    """Tensors, parameters and bytes of the encoder, the projector and the decoder."""
    sizes = {}
    for part, prefix in PARTS.items():
        infos = [info for info in checkpoint.infos.values() if info.name.startswith(prefix)]
        parameters = sum(math.prod(info.shape) for info in infos)
        sizes[part] = {
            "tensors": len(infos),
            "parameters": parameters,
            "bytes": sum(info.size_bytes for info in infos),
        }
    return sizes


def _vision(spec: VisionSpec) -> Iterator[tuple[str, Shape]]:
    hidden, width = spec.hidden_size, spec.attention_width
    yield "vision_model.embeddings.class_embedding", (1, 1, hidden)
    yield "vision_model.embeddings.patch_embedding.weight", (hidden, 3, spec.patch_size, spec.patch_size)
    yield "vision_model.embeddings.patch_embedding.bias", (hidden,)
    yield "vision_model.embeddings.position_embedding", (1, spec.positions, hidden)
    block: dict[str, Shape] = {
        "norm1.weight": (hidden,),
        "norm2.weight": (hidden,),
        "attn.qkv.weight": (3 * width, hidden),
        "attn.q_norm.weight": (width,),
        "attn.k_norm.weight": (width,),
        "attn.proj.weight": (hidden, width),
        "attn.proj.bias": (hidden,),
        "mlp.fc1.weight": (spec.intermediate_size, hidden),
        "mlp.fc1.bias": (spec.intermediate_size,),
        "mlp.fc2.weight": (hidden, spec.intermediate_size),
        "mlp.fc2.bias": (hidden,),
        "ls1": (hidden,),
        "ls2": (hidden,),
    }
    for layer in range(spec.layers):
        yield from ((f"vision_model.encoder.layers.{layer}.{name}", shape) for name, shape in block.items())


def _projector(spec: ProjectorSpec) -> Iterator[tuple[str, Shape]]:
    yield "mlp1.0.weight", (spec.input_size,)
    yield "mlp1.0.bias", (spec.input_size,)
    yield "mlp1.1.weight", (spec.hidden_size, spec.input_size)
    yield "mlp1.3.weight", (spec.output_size, spec.hidden_size)


def _decoder(spec: DecoderSpec) -> Iterator[tuple[str, Shape]]:
    hidden, inner = spec.hidden_size, spec.intermediate_size
    queries, keys = spec.heads * spec.head_size, spec.kv_heads * spec.head_size
    yield "language_model.model.embed_tokens.weight", (spec.vocab_size, hidden)
    layer: dict[str, Shape] = {
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.q_proj.bias": (queries,),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.k_proj.bias": (keys,),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.v_proj.bias": (keys,),
        "self_attn.o_proj.weight": (hidden, queries),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    for number in range(spec.layers):
        yield from ((f"language_model.model.layers.{number}.{name}", shape) for name, shape in layer.items())
    yield "language_model.model.norm.weight", (hidden,)
    yield "language_model.lm_head.weight", (spec.vocab_size, hidden)
