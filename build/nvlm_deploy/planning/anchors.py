"""Published measurements of 70B decoders on TensorRT-LLM, and what our arithmetic says to each.

ANCHORS are the rows of facts pains-and-anchors.md part 2.2 in its order, tables read row by row, left to right: all
that state GPU, GPU count, type, lengths and how many requests ran, and are not marked there as secondary. TensorRT-LLM
1.0's perf-overview states maximum load: as many requests as memory holds. UNCOUNTED are rows of old releases that lack
the number of requests alone; they are shown under the same assumption, and neither fitted nor tested.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

from nvlm_deploy.checkpoint.trtllm_layout import FP8, Layout, Parallelism
from nvlm_deploy.model.spec import DecoderSpec
from nvlm_deploy.planning.memory import PROCESS_BYTES, decoder_activation_bytes, kv_bytes_on_rank, nccl_bytes
from nvlm_deploy.planning.roofline import EFFICIENCY, Efficiency, SplitDecoder
from nvlm_deploy.planning.serving import Demand, predict
from nvlm_deploy.planning.weights import decoder_bytes
from nvlm_deploy.sku import load_sku

TTFT, TPOT, THROUGHPUT = "first token, ms", "per token, ms", "tokens/s"

# trtllm-build's defaults (contract B) and the backend's (contract C.3)
_MAX_BATCH_SIZE, _MAX_NUM_TOKENS, _KV_SHARE = 2048, 8192, 0.9
_LLAMA_2 = DecoderSpec(32000, 8192, 28672, 80, 64, 8, 1e-5, 10_000.0, 4096)
_LLAMA_3 = replace(_LLAMA_2, vocab_size=128256, rotary_base=500_000.0, max_positions=131072)


@dataclass(frozen=True)
class Setup:
    """What was measured: a decoder split over GPUs. `kv_bytes` are of one cached element."""

    source: str
    decoder: DecoderSpec
    sku: str
    tensor: int
    fp8: bool = True
    kv_bytes: int = 1


@dataclass(frozen=True)
class Anchor:
    """One published number: `value` in the unit that `quantity` names; `at_once` requests, None for all that fit."""

    setup: Setup
    quantity: str
    input_tokens: int
    output_tokens: int
    at_once: int | None
    value: float

    def predicted(self, efficiency: Efficiency = EFFICIENCY) -> float:
        """Our number for it, in the same unit."""
        most = _running_by_memory(self.setup, self.input_tokens + self.output_tokens)
        concurrency = most if self.at_once is None else self.at_once
        demand = Demand(0.0, 0.0, self.input_tokens, self.output_tokens, concurrency, most)
        found = predict(_split(self.setup, efficiency), demand)
        return {TTFT: 1e3 * found.ttft_s, TPOT: 1e3 * found.tpot_s, THROUGHPUT: found.tokens_per_s}[self.quantity]

    def error(self, efficiency: Efficiency = EFFICIENCY) -> float:
        """Predicted over published, less one."""
        return self.predicted(efficiency) / self.value - 1


def halves(anchors: tuple[Anchor, ...]) -> tuple[tuple[Anchor, ...], tuple[Anchor, ...]]:
    """Rows to fit and rows to test: in turn within each source, GPU and quantity, the first of each to fit.

    The rule looks at no error. Turns are not taken along the whole list: a table of two columns, read row by row, would
    put one column into each half.
    """
    seen: Counter[tuple[str, str, str]] = Counter()
    fit: list[Anchor] = []
    test: list[Anchor] = []
    for anchor in anchors:
        group = (anchor.setup.source, anchor.setup.sku, anchor.quantity)
        (test if seen[group] % 2 else fit).append(anchor)
        seen[group] += 1
    return tuple(fit), tuple(test)


def _split(setup: Setup, efficiency: Efficiency) -> SplitDecoder:
    weight_bytes = 1 if setup.fp8 else 2
    sku = load_cached(setup.sku)
    return SplitDecoder(setup.decoder, sku, setup.tensor, 1, weight_bytes, setup.kv_bytes, efficiency)


load_cached = cache(load_sku)


@cache
def _running_by_memory(setup: Setup, tokens: int) -> int:
    layout = Layout(setup.decoder, FP8 if setup.fp8 else None, Parallelism(setup.tensor))
    activations = decoder_activation_bytes(setup.decoder, _MAX_NUM_TOKENS, setup.tensor)
    taken = decoder_bytes(layout, 0).total + activations + PROCESS_BYTES + nccl_bytes(setup.tensor)
    per_token = kv_bytes_on_rank(layout, 0, "fp8" if setup.kv_bytes == 1 else "16bit")
    free = _KV_SHARE * (load_cached(setup.sku).visible_bytes - taken)
    return max(1, min(_MAX_BATCH_SIZE, int(free / per_token) // tokens))


def _rows() -> Iterator[Anchor]:
    yield from _perf_overview()
    yield from _engine_era()
    yield from _modelopt()
    yield from _nim()


def _perf_overview() -> Iterator[Anchor]:
    h200, h100 = (
        Setup("TensorRT-LLM 1.0 perf-overview", _LLAMA_3, sku, tensor)
        for sku, tensor in (("h200-141gb", 1), ("h100-sxm-80gb", 2))
    )
    table = (
        (128, 128, 3803, 6378),
        (128, 2048, 4336, 6651),
        (500, 2000, 3666, 5222),
        (1000, 1000, 2909, 4205),
        (2048, 128, 442, 762),
        (2048, 2048, 2003, 3082),
        (5000, 500, 566, 898),
        (20000, 2000, 283, 437),
    )
    for input_tokens, output_tokens, on_h200, on_h100 in table:
        yield Anchor(h200, THROUGHPUT, input_tokens, output_tokens, None, on_h200)
        yield Anchor(h100, THROUGHPUT, input_tokens, output_tokens, None, on_h100)


_V06 = Setup("TensorRT-LLM 0.6.1", _LLAMA_2, "h100-sxm-80gb", 4)
_V06_A100 = replace(_V06, sku="a100-80gb", fp8=False, kv_bytes=2)
_V05_H200 = Setup("TensorRT-LLM 0.5", _LLAMA_2, "h200-141gb", 1)


def _engine_era() -> Iterator[Anchor]:
    for setup, tokens, value in ((_V06, 128, 26), (_V06, 2048, 109), (_V06_A100, 128, 47), (_V06_A100, 2048, 377)):
        yield Anchor(setup, TTFT, tokens, 1, 1, value)
    v05 = replace(_V06, source="TensorRT-LLM 0.5")
    for lengths, value in (((128, 128), 3317), ((128, 2048), 2616), ((2048, 128), 843), ((2048, 2048), 1583)):
        yield Anchor(v05, THROUGHPUT, *lengths, 64, value)
    for lengths, batch, value in (((128, 128), 512, 3014), ((2048, 128), 64, 341), ((2048, 128), 32, 303)):
        yield Anchor(_V05_H200, THROUGHPUT, *lengths, batch, value)


def _without_batch() -> Iterator[Anchor]:
    for lengths, tensor, a_gpu in (
        ((128, 128), 2, 2657),
        ((128, 2048), 4, 1486),
        ((2048, 128), 2, 306),
        ((2048, 2048), 2, 547),
    ):
        yield Anchor(replace(_V06, tensor=tensor), THROUGHPUT, *lengths, None, a_gpu * tensor)
    for lengths, a_gpu in (((128, 128), 670), ((128, 2048), 525), ((2048, 128), 79)):
        yield Anchor(_V06_A100, THROUGHPUT, *lengths, None, a_gpu * 4)
    yield Anchor(replace(_V05_H200, tensor=2), THROUGHPUT, 128, 2048, None, 1654 * 2)
    newer = replace(_V05_H200, source="TensorRT-LLM 0.7a")
    for lengths, value in (((128, 128), 3803), ((128, 2048), 2941), ((128, 4096), 1946)):
        yield Anchor(newer, THROUGHPUT, *lengths, None, value)


def _modelopt() -> Iterator[Anchor]:
    fp8 = Setup("ModelOpt, TensorRT-LLM 0.15", _LLAMA_3, "h200-141gb", 1, kv_bytes=2)
    bf16 = replace(fp8, tensor=2, fp8=False)
    for setup, values in ((bf16, (45.8, 182.6, 401.5)), (fp8, (43.5, 182.1, 420.6))):
        for batch, value in zip((1, 8, 64), values, strict=True):
            yield Anchor(setup, THROUGHPUT, 2048, 128, batch, value)


def _nim() -> Iterator[Anchor]:
    nim = Setup("NIM 1.8.0", _LLAMA_3, "h100-sxm-80gb", 2)
    table = ((1, 406.8, 18.58), (5, 546.7, 21.83), (25, 688.7, 38.75), (50, 834.5, 59.73), (100, 7996, 92.91))
    for concurrency, ttft, tpot in table:
        yield Anchor(nim, TTFT, 5000, 500, concurrency, ttft)
        yield Anchor(nim, TPOT, 5000, 500, concurrency, tpot)
    yield Anchor(nim, TTFT, 500, 2000, 1, 47.8)
    yield Anchor(nim, TPOT, 500, 2000, 1, 18.91)


ANCHORS = tuple(_rows())
UNCOUNTED = tuple(_without_batch())
