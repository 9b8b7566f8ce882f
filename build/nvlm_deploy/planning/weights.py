"""Bytes of what is built: the decoder's ranks, exactly, and the encoder with its dummy heads pruned."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

from nvlm_deploy.checkpoint.stream import tensor_bytes
from nvlm_deploy.checkpoint.trtllm_layout import Layout, Parallelism
from nvlm_deploy.model.inventory import vision_tensors
from nvlm_deploy.model.spec import ModelSpec
from nvlm_deploy.profile import Profile
from nvlm_deploy.recipe import KV_CACHE_QUANT_ALGOS, QUANT_ALGOS

PRECISION_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 2}
# FP8 is of the blocks' products; the projector and all else stay in 16 bits (vision/quantize.py)
_FP8_IN_VISION = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")


@dataclass(frozen=True)
class DecoderBytes:
    """Weights of one rank: `linears` are those of the layers, `others` embeddings, head, norms, biases and scales."""

    linears: int
    others: int

    @property
    def total(self) -> int:
        return self.linears + self.others


def layout_of(spec: ModelSpec, profile: Profile) -> Layout:
    """How the profile splits the decoder. Raises NvlmError naming the legal splits."""
    choice = profile.decoder
    parallelism = Parallelism(choice.tensor_parallel, choice.pipeline_parallel)
    return Layout(spec.decoder, QUANT_ALGOS[choice.quantization], parallelism, KV_CACHE_QUANT_ALGOS[choice.kv_cache])


def decoder_bytes(layout: Layout, rank: int) -> DecoderBytes:
    """Of the tensors that TensorRT-LLM's checkpoint has for this rank: as many bytes as each rank of its stage has."""
    return _stage_bytes(layout, rank // layout.parallelism.tensor)


@cache
def _stage_bytes(layout: Layout, stage: int) -> DecoderBytes:
    linears = others = 0
    for name, (dtype, shape) in layout.rank_tensors(stage * layout.parallelism.tensor).items():
        size = tensor_bytes(dtype, shape)
        if ".layers." in name and len(shape) == 2:
            linears += size
        else:
            others += size
    return DecoderBytes(linears, others)


def whole_decoder_bytes(layout: Layout) -> DecoderBytes:
    """Of all ranks as one, nothing padded or repeated."""
    return decoder_bytes(replace(layout, parallelism=Parallelism()), 0)


def vision_engine_bytes(spec: ModelSpec, precision: str) -> int:
    """Encoder and projector as exported: dummy heads pruned, which is exact (facts nvlm-d.md section 2)."""
    pruned = replace(spec, vision=replace(spec.vision, padded_heads=spec.vision.heads))
    return sum(
        math.prod(shape) * (1 if precision == "fp8" and name.endswith(_FP8_IN_VISION) else PRECISION_BYTES[precision])
        for name, shape in vision_tensors(pruned).items()
    )
