"""Seconds of the decoder and of the encoder by roofline: work over a stated share of the hardware's stated peak.

The shares are fitted to published measurements of 70B decoders on TensorRT-LLM (anchors.py; the fit and its test are
tests/bench/bench_predictions.py). No InternViT-6B on TensorRT was published: the encoder's share is an assumption.
"""

from __future__ import annotations

from dataclasses import dataclass

from nvlm_deploy.model.spec import DecoderSpec, ModelSpec
from nvlm_deploy.sku import Sku

FP8_ENCODER_SPEEDUP = 1.2  # about 20 % for ViTs: NVIDIA/TensorRT#4599
PCIE_5_GB_S = 128.0  # of GPUs beyond those that NVLink joins


@dataclass(frozen=True)
class Efficiency:
    """Shares of stated peaks, and what no peak explains.

    `bandwidth`, `fp8`, `sixteen_bit` and `link` are of memory, of dense products in either width and of one
    direction of NVLink; `all_reduce_s` is the least that one all-reduce takes, `first_token_s` what a request waits for
    beside its own forward pass. Not fitted, for no row has them: `vision`, of dense 16-bit products in the encoder, is
    assumed; `pcie`, of one direction of PCIe, is what NCCL reached on eight GPUs (28 of 64 GB/s, NVIDIA/nccl#1639).
    """

    bandwidth: float
    fp8: float
    sixteen_bit: float
    link: float
    all_reduce_s: float
    first_token_s: float
    vision: float = 0.5
    pcie: float = 0.44


# fitted to one half of the published rows, tested on the other; see halves() in anchors.py
EFFICIENCY = Efficiency(
    bandwidth=0.593, fp8=0.569, sixteen_bit=0.686, link=0.302, all_reduce_s=3.65e-6, first_token_s=0.0130
)


@dataclass(frozen=True)
class SplitDecoder:
    """A decoder on some GPUs of one SKU; `weight_bytes` and `kv_bytes` are of one element, 1 or 2."""

    spec: DecoderSpec
    sku: Sku
    tensor: int = 1
    pipeline: int = 1
    weight_bytes: int = 1
    kv_bytes: int = 2
    efficiency: Efficiency = EFFICIENCY

    def prefill_s(self, tokens: int) -> float:
        """A prompt of so many tokens, alone. Causal attention computes half of all pairs."""
        return self._pass_s(tokens, sequences=1, cached=0, pairs=tokens * tokens / 2)

    def decode_s(self, sequences: int, context: float) -> float:
        """One token for each of some sequences that are so long by now."""
        return self._pass_s(sequences, sequences, cached=sequences * context, pairs=sequences * context)

    def _pass_s(self, tokens: int, sequences: int, cached: float, pairs: float) -> float:
        """One forward pass: a GPU's products or its memory traffic, whichever takes longer, and the all-reduces.

        `cached` tokens are read from the KV cache; `pairs` of query and key meet in each layer. Pipeline stages follow
        one another, so that they shorten no pass.
        """
        spec, sku, share = self.spec, self.sku, self.efficiency
        linears, head = linear_parameters(spec), spec.vocab_size * spec.hidden_size
        sixteen_bit = sku.dense_tflops["bf16"] * 1e12 * share.sixteen_bit
        products = sku.dense_tflops["fp8"] * 1e12 * share.fp8 if self.weight_bytes == 1 else sixteen_bit
        attention = 4 * pairs * spec.heads * spec.head_size * spec.layers
        compute_s = 2 * linears * tokens / products + (2 * head * sequences + attention) / sixteen_bit
        cache = cached * 2 * spec.layers * spec.kv_heads * spec.head_size * self.kv_bytes
        traffic = linears * self.weight_bytes + 2 * head + cache
        memory_s = traffic / ((sku.bandwidth_gb_s or 0) * 1e9 * share.bandwidth)
        return max(compute_s, memory_s) / self.tensor + self._all_reduces_s(tokens)

    def _all_reduces_s(self, tokens: int) -> float:
        """Two in every layer, each a ring over the tensor-parallel GPUs, 16 bits an element."""
        if self.tensor == 1:
            return 0.0
        ring = 2 * (self.tensor - 1) / self.tensor * tokens * self.spec.hidden_size * 2
        rate = link_gb_s(self.sku, self.tensor) / 2 * 1e9
        share = self.efficiency.link if has_nvlink(self.sku, self.tensor) else self.efficiency.pcie
        return 2 * self.spec.layers * (self.efficiency.all_reduce_s + ring / (rate * share))


def linear_parameters(spec: DecoderSpec) -> int:
    """Weights of all layers' products, without the embedding table and the head."""
    width, kv_width = spec.heads * spec.head_size, spec.kv_heads * spec.head_size
    return spec.layers * spec.hidden_size * (2 * width + 2 * kv_width + 3 * spec.intermediate_size)


def has_nvlink(sku: Sku, gpus: int) -> bool:
    """Whether so many GPUs are all joined by NVLink; one needs no link."""
    if gpus == 1:
        return True
    return sku.interconnect is not None and sku.interconnect.kind == "nvlink" and gpus <= sku.interconnect.gpus


def link_gb_s(sku: Sku, gpus: int) -> float:
    """Both directions of one GPU: the SKU's own link for as many as it joins, else PCIe."""
    link = sku.interconnect
    if link is None:
        return PCIE_5_GB_S
    return link.gb_s if gpus <= link.gpus else min(link.gb_s, PCIE_5_GB_S)


def encoder_flops(spec: ModelSpec) -> dict[str, float]:
    """Of one tile: the encoder's linears and attention without dummy heads, and the projector."""
    vision, projector = spec.vision, spec.projector
    block = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
    return {
        "linears": 2.0 * vision.positions * vision.layers * block,
        "attention": 4.0 * vision.positions**2 * vision.hidden_size * vision.layers,
        "projector": 2.0
        * spec.tiling.tokens_per_tile
        * projector.hidden_size
        * (projector.input_size + projector.output_size),
    }


def encoder_s(spec: ModelSpec, sku: Sku, tiles: int, precision: str, efficiency: Efficiency = EFFICIENCY) -> float:
    """Tiles of one request on one GPU; 0 for none. float32 runs at half of the 16-bit rate, in TF32."""
    speedup = {"fp8": FP8_ENCODER_SPEEDUP, "fp32": 0.5}.get(precision, 1.0)
    rate = sku.dense_tflops["bf16"] * 1e12 * efficiency.vision * speedup
    return tiles * sum(encoder_flops(spec).values()) / rate
