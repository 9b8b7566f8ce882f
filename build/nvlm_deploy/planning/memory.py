"""The memory account of each GPU: every line with its origin, the KV cache from what is left, in bytes and tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from nvlm_deploy.checkpoint.trtllm_layout import Layout
from nvlm_deploy.llm.engine_arguments import TOKENS_PER_BLOCK, EngineLimits, engine_limits
from nvlm_deploy.model.spec import DecoderSpec, ModelSpec
from nvlm_deploy.planning.weights import DecoderBytes, decoder_bytes, layout_of, vision_engine_bytes
from nvlm_deploy.profile import Profile
from nvlm_deploy.sku import REFERENCE, Sku

GIB = 2**30
MIB = 2**20
KV_BYTES = {"16bit": 2, "fp8": 1}

# a process with a CUDA context, its libraries and loaded kernels; ai-dynamo/aiconfigurator saw 551 MB with
# TensorRT-LLM (systems/*.yaml, other_mem) and reserves more "for safer deployment", as we do
PROCESS_BYTES = GIB
# ai-dynamo/aiconfigurator systems/*.yaml, nccl_mem: by ranks that talk to one another
NCCL_BYTES = {1: 0, 2: 342 * MIB}
NCCL_BYTES_FROM_FOUR = 392 * MIB
# no account is complete: fragments, CUDA graphs, the next driver's share
UNFORESEEN_PERCENT = 2
# ai-dynamo/aiconfigurator, memory model of TensorRT-LLM: floor of what an engine's activations take
LEAST_ACTIVATIONS = 70 * MIB


@dataclass(frozen=True)
class Room:
    """Memory to fill: of each GPU, as its SKU states it, or of a host, as it is free now. `place` is GPU or host."""

    visible_bytes: int
    place: str
    evidence: str


@dataclass(frozen=True)
class Line:
    """One item of an account. `evidence` is published or derived, `how` the source or the arithmetic.

    `comes_later` is what is taken only after the KV cache is.
    """

    name: str
    size_bytes: int
    evidence: str
    how: str
    is_weights: bool = False
    comes_later: bool = False


@dataclass(frozen=True)
class GpuAccount:
    """What lies on one GPU beside the KV cache. `kv_bytes_per_token` is this rank's share."""

    rank: int
    lines: tuple[Line, ...]
    visible_bytes: int
    kv_bytes_per_token: int

    @property
    def fixed_bytes(self) -> int:
        return sum(line.size_bytes for line in self.lines)

    @property
    def weight_bytes(self) -> int:
        return sum(line.size_bytes for line in self.lines if line.is_weights)

    @property
    def later_bytes(self) -> int:
        return sum(line.size_bytes for line in self.lines if line.comes_later)

    @property
    def kv_tokens_by_memory(self) -> int:
        """Whole blocks of tokens that the rest of the memory holds; 0 when nothing is left."""
        blocks = (self.visible_bytes - self.fixed_bytes) // (self.kv_bytes_per_token * TOKENS_PER_BLOCK)
        return max(0, blocks) * TOKENS_PER_BLOCK


@dataclass(frozen=True)
class MemoryAccount:
    """All GPUs of a profile, or the host where there is none. Ranks share one count of KV tokens: the smallest."""

    gpus: tuple[GpuAccount, ...]
    limits: EngineLimits
    kv_bytes_per_token: int
    room: Room

    @cached_property
    def kv_tokens(self) -> int:
        """Never more than max_batch_size sequences of max_seq_len, each in whole blocks."""
        most = self.limits.max_batch_size * _in_blocks(self.limits.max_seq_len)
        return min(most, *(gpu.kv_tokens_by_memory for gpu in self.gpus))

    def kv_bytes(self, gpu: GpuAccount) -> int:
        return self.kv_tokens * gpu.kv_bytes_per_token

    @property
    def kv_share_of_free(self) -> float:
        """Of what is free on a GPU when all else but what comes later is there, the cache's share: on the GPU with the
        largest, rounded up to thousandths, as TensorRT-LLM's `kv_cache_free_gpu_mem_fraction` wants it.
        """
        shares = (self.kv_bytes(gpu) / (self.kv_bytes(gpu) + gpu.later_bytes) for gpu in self.gpus)
        return math.ceil(1000 * max(shares)) / 1000

    def used_bytes(self, gpu: GpuAccount) -> int:
        return gpu.fixed_bytes + self.kv_bytes(gpu)

    @property
    def tightest(self) -> GpuAccount:
        return min(self.gpus, key=lambda gpu: (gpu.kv_tokens_by_memory, gpu.rank))

    def needed_bytes(self, gpu: GpuAccount) -> int:
        """With the cache of one sequence of max_seq_len, without which nothing can be served."""
        return gpu.fixed_bytes + gpu.kv_bytes_per_token * _in_blocks(self.limits.max_seq_len)

    @property
    def fits(self) -> bool:
        return self.kv_tokens >= _in_blocks(self.limits.max_seq_len)

    @property
    def why_not(self) -> str:
        """As `needs 95.2 GiB on GPU 0 (81.5 of weights), 79.2 visible`; of the GPU that misses most."""
        gpu = self.tightest
        on = f"on GPU {gpu.rank}" if self.room.place == "GPU" else "of host memory"
        needed, weights = self.needed_bytes(gpu) / GIB, gpu.weight_bytes / GIB
        return f"needs {needed:.1f} GiB {on} ({weights:.1f} of weights), {gpu.visible_bytes / GIB:.1f} visible"

    def requests(self, tokens_each: int) -> int:
        """How many of so many tokens (prompt and answer) are served at once."""
        return min(self.limits.max_batch_size, self.kv_tokens // _in_blocks(tokens_each))


def kv_bytes_per_token(spec: DecoderSpec, kv_cache: str) -> int:
    """Keys and values of all layers, one token; `16bit` or `fp8`."""
    return 2 * spec.layers * spec.kv_heads * spec.head_size * KV_BYTES[kv_cache]


def kv_bytes_on_rank(layout: Layout, rank: int, kv_cache: str) -> int:
    """A rank has its stage's layers and its own heads; heads are repeated where ranks outnumber them."""
    tensor, spec = layout.parallelism.tensor, layout.spec
    layers = len(layout.parallelism.stage_layers(spec.layers, rank // tensor))
    return 2 * layers * max(1, spec.kv_heads // tensor) * spec.head_size * KV_BYTES[kv_cache]


def limits_of(spec: ModelSpec, profile: Profile) -> EngineLimits:
    decoder = profile.decoder
    return engine_limits(
        spec.tiling,
        max_batch_size=decoder.max_batch_size,
        max_seq_len=decoder.max_seq_len,
        max_images=profile.serving.max_images,
        max_num_tokens=decoder.max_num_tokens,
    )


def room_of(sku: Sku, host_bytes: int) -> Room:
    """A GPU's memory, or the host's where the SKU is none; `host_bytes` are free."""
    if sku.compute_capability is None:
        return Room(host_bytes, "host", "measured")
    return Room(sku.visible_bytes, "GPU", "published")


def memory_account(spec: ModelSpec, profile: Profile, room: Room) -> MemoryAccount:
    """The account of a profile in so much memory.

    Raises NvlmError for a split that the model does not allow.
    """
    layout, limits = layout_of(spec, profile), limits_of(spec, profile)
    kv_cache = profile.decoder.kv_cache
    if profile.decoder.runtime == REFERENCE:
        lines = (*_reference_lines(layout), *_vision_lines(spec, profile), *_host_lines(), _unforeseen(room))
        per_token = kv_bytes_per_token(spec.decoder, kv_cache)
        return MemoryAccount((GpuAccount(0, lines, room.visible_bytes, per_token),), limits, per_token, room)
    gpus = tuple(
        GpuAccount(
            rank,
            tuple(_rank_lines(spec, profile, layout, limits, rank))
            + (tuple(_vision_lines(spec, profile)) if rank == 0 else ())
            + (_unforeseen(room),),
            room.visible_bytes,
            kv_bytes_on_rank(layout, rank, kv_cache),
        )
        for rank in range(layout.parallelism.world_size)
    )
    return MemoryAccount(gpus, limits, kv_bytes_per_token(spec.decoder, kv_cache), room)


def decoder_activation_bytes(spec: DecoderSpec, tokens: int, tensor_parallel: int) -> int:
    """Of one layer, as TensorRT reuses memory from layer to layer: the stream and its norm, and the gated MLP's two
    products in 16 bits with their quantised result, a rank's share of it.

    11 hidden sizes a token for one rank and 6.5 for two, which are the constants of ai-dynamo/aiconfigurator's memory
    model of TensorRT-LLM; its 5 hidden sizes for more ranks are the floor here.
    """
    a_token = max(2 * spec.hidden_size + -(-5 * spec.intermediate_size // (2 * tensor_parallel)), 5 * spec.hidden_size)
    return max(LEAST_ACTIVATIONS, 2 * a_token * tokens)


def vision_activation_bytes(spec: ModelSpec, tiles: int, precision: str) -> int:
    """Of one block at its widest, where attention is fused: residual and branch, and the MLP's product before and
    after its activation, for every position of every tile; fused attention never writes its scores.
    """
    vision, element = spec.vision, 4 if precision == "fp32" else 2
    widest = 2 * vision.hidden_size + max(2 * vision.intermediate_size, 6 * vision.hidden_size)
    projector = spec.tiling.tokens_per_tile * (spec.projector.input_size + 2 * spec.projector.hidden_size)
    return tiles * element * max(vision.positions * widest, projector)


def prompt_table_bytes(spec: ModelSpec, limits: EngineLimits) -> int:
    return limits.prompt_table_rows * spec.decoder.hidden_size * 2


def nccl_bytes(world_size: int) -> int:
    return NCCL_BYTES.get(world_size, NCCL_BYTES_FROM_FOUR)


def _rank_lines(spec: ModelSpec, profile: Profile, layout: Layout, limits: EngineLimits, rank: int) -> Iterator[Line]:
    yield from _weight_lines(decoder_bytes(layout, rank), profile.decoder.quantization)
    table = prompt_table_bytes(spec, limits)
    rows = f"{limits.max_batch_size} requests x {limits.visual_tokens} visual tokens x hidden size x 2 B"
    yield Line("prompt table of the engine", table, "derived", f"{rows}; TensorRT-LLM promptTuningBuffers.cpp")
    own = "each request's own, moved to the GPU; the same file"
    yield Line("prompt tables of requests", table, "derived", own, comes_later=True)
    yield from _activation_lines(layout, limits)
    yield Line(
        "CUDA, libraries, kernels", PROCESS_BYTES, "derived", "551 MB seen by ai-dynamo/aiconfigurator, rounded up"
    )
    nccl = nccl_bytes(layout.parallelism.world_size)
    if nccl:
        yield Line("NCCL", nccl, "published", "ai-dynamo/aiconfigurator systems/*.yaml, nccl_mem")


def _weight_lines(weights: DecoderBytes, quantization: str) -> Iterator[Line]:
    kind = "BF16" if quantization == "none" else "FP8"
    yield Line(f"decoder linears, {kind}", weights.linears, "derived", "the rank's tensors by shape", True)
    yield Line("decoder rest, BF16", weights.others, "derived", "embeddings, head, norms, biases, scales", True)


def _activation_lines(layout: Layout, limits: EngineLimits) -> Iterator[Line]:
    spec, tensor = layout.spec, layout.parallelism.tensor
    size = decoder_activation_bytes(spec, limits.max_num_tokens, tensor)
    yield Line("decoder activations", size, "derived", f"one layer at max_num_tokens {limits.max_num_tokens}")
    # float32 logits, and as much again for sampling's sorted copies and workspace
    logits = 4 * 4 * limits.max_batch_size * spec.vocab_size
    yield Line("logits and sampling", logits, "derived", "4 x batch x vocabulary in float32")


def _vision_lines(spec: ModelSpec, profile: Profile) -> Iterator[Line]:
    vision = profile.vision
    tiles, precision = vision.max_tiles_per_run, vision.precision
    weights = vision_engine_bytes(spec, precision)
    yield Line(
        f"vision engine, {precision.upper()}", weights, "derived", "encoder without dummy heads, projector", True
    )
    activations = vision_activation_bytes(spec, tiles, precision)
    yield Line(f"vision activations, {tiles} tiles", activations, "derived", "one block, attention fused")
    output = tiles * spec.tiling.tokens_per_tile * spec.decoder.hidden_size * 2
    pixels = tiles * 3 * spec.tiling.tile_size**2
    yield Line("tiles and embeddings in flight", 2 * (output + pixels), "derived", "one run's, and the next one's")
    if profile.decoder.runtime != REFERENCE:
        yield Line("vision process, CUDA", PROCESS_BYTES, "derived", "a python model of Triton, a process of its own")


def _reference_lines(layout: Layout) -> Iterator[Line]:
    """FP8 weights stay FP8; everything else is widened to float32 (model/reference.py)."""
    weights = decoder_bytes(Layout(layout.spec, layout.quant_algo, kv_cache_quant_algo=layout.kv_cache_quant_algo), 0)
    widened = 2 if layout.quant_algo is None else 1
    yield Line("decoder linears", widened * weights.linears, "derived", "FP8 as it is, BF16 as float32", True)
    yield Line("decoder rest, float32", 2 * weights.others, "derived", "embeddings, head, norms, biases", True)


def _host_lines() -> Iterator[Line]:
    yield Line("Triton and python models", 2 * GIB, "derived", "four stubs with torch or ONNX Runtime")


def _unforeseen(room: Room) -> Line:
    size = room.visible_bytes * UNFORESEEN_PERCENT // 100
    how = f"{UNFORESEEN_PERCENT} % of what is visible: fragments, CUDA graphs"
    return Line("left free", size, "derived", how, comes_later=True)


def _in_blocks(tokens: int) -> int:
    return -(-tokens // TOKENS_PER_BLOCK) * TOKENS_PER_BLOCK
