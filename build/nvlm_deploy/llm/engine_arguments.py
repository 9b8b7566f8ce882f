"""What trtllm-build is asked for: its flags, and beside each the field of the engine's config.json that answers it.

Flags, defaults and rules: contract B; the FP8 attention rules are those of `build()` in tensorrt_llm/builder.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nvlm_deploy.checkpoint.trtllm_layout import FP8, FP8_PER_CHANNEL
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.model.spec import TilingSpec
from nvlm_deploy.sku import Sku

TOKENS_PER_BLOCK = 32
# trtllm-build's own default; above 16384 it warns that nothing is gained
DEFAULT_NUM_TOKENS = 8192
# `build()` raises for per-channel or per-token scales from here on
FIRST_WITHOUT_PER_CHANNEL = (10, 0)


@dataclass(frozen=True)
class EngineLimits:
    """The most that an engine takes at once; `visual_tokens` is of one request."""

    max_batch_size: int
    max_seq_len: int
    max_num_tokens: int
    visual_tokens: int

    @property
    def prompt_table_rows(self) -> int:
        """Rows of all requests: the runtime grants each request rows / max_batch_size of them (contract C.2)."""
        return self.max_batch_size * self.visual_tokens


@dataclass(frozen=True)
class Argument:
    """One flag with its value, and what the engine's `build_config` must hold under the dotted name `field`."""

    flag: str
    value: str
    field: str
    expected: object


def engine_limits(
    tiling: TilingSpec, *, max_batch_size: int, max_seq_len: int, max_images: int, max_num_tokens: int | None = None
) -> EngineLimits:
    """Limits from what clients may send; visual tokens that cannot fit in a sequence get no room.

    Without `max_num_tokens` a prompt of any legal length fits in one context step, so that serving needs no chunks.
    """
    most = max_images * tiling.max_tiles_with_thumbnail * tiling.tokens_per_tile
    fitting = max_seq_len // tiling.tokens_per_tile * tiling.tokens_per_tile
    if not fitting:
        raise NvlmError(f"max_seq_len {max_seq_len} is shorter than one tile of {tiling.tokens_per_tile} visual tokens")
    derived = min(max(DEFAULT_NUM_TOKENS, max_seq_len), max_batch_size * max_seq_len)
    tokens = derived if max_num_tokens is None else max_num_tokens
    return EngineLimits(max_batch_size, max_seq_len, tokens, min(most, fitting))


def engine_arguments(config: Mapping[str, Any], sku: Sku, limits: EngineLimits) -> tuple[Argument, ...]:
    """Every choice about the engine of a checkpoint with this config.json, defaults written out.

    Raises NvlmError for a GPU that cannot run the checkpoint and for limits that contradict one another.
    """
    require_target(config, sku)
    quantization = config["quantization"]
    fp8_kv = quantization["kv_cache_quant_algo"] == FP8
    # FP8 attention over a paged context wants FP8 linears and an FP8 cache; an FP8 cache over a paged context wants
    # FP8 attention. trtllm-build would override anything else with a warning (contract B, "Logic that matters").
    fp8_attention = fp8_kv and quantization["quant_algo"] == FP8
    paged_context = fp8_attention or not fp8_kv
    _require_limits(limits, paged_context=paged_context)
    return (
        *_sizes(limits),
        *_plugins(config["dtype"], quantization["quant_algo"]),
        _switch("context_fmha", True),
        _switch("remove_input_padding", True),
        _switch("use_paged_context_fmha", paged_context),
        _switch("use_fp8_context_fmha", fp8_attention),
        _switch("use_fused_mlp", quantization["quant_algo"] != FP8_PER_CHANNEL),
    )


def require_target(config: Mapping[str, Any], sku: Sku) -> None:
    """Refuse, with the reason, what this GPU cannot compute."""
    quant_algo = config["quantization"]["quant_algo"]
    gpu = f"{sku.name} (compute capability {sku.compute_capability})"
    if sku.compute_capability is None:
        raise NvlmError(f"SKU {sku.name!r} has no GPU: engines run on GPUs", hint='choose runtime = "reference"')
    if not sku.has_bf16:
        raise NvlmError(
            f"{gpu} has no BF16, the type of the decoder", hint="choose a GPU of the Ampere family or newer"
        )
    if quant_algo is not None and not sku.has_fp8:
        raise NvlmError(f"{gpu} has no FP8: {quant_algo} cannot run there", hint='choose quantization = "none"')
    if config["quantization"]["kv_cache_quant_algo"] == FP8 and not sku.has_fp8:
        raise NvlmError(f"{gpu} has no FP8: its KV cache cannot be FP8", hint='choose kv_cache = "16bit"')
    if quant_algo == FP8_PER_CHANNEL and sku.capability >= FIRST_WITHOUT_PER_CHANNEL:
        raise NvlmError(
            f"TensorRT-LLM builds no {quant_algo} for {gpu}: not from compute capability 10.0 on",
            hint='choose quantization = "fp8"',
        )


def _require_limits(limits: EngineLimits, *, paged_context: bool) -> None:
    most = limits.max_batch_size * limits.max_seq_len
    if not TOKENS_PER_BLOCK <= limits.max_num_tokens <= most:
        raise NvlmError(
            f"max_num_tokens {limits.max_num_tokens} is not between {TOKENS_PER_BLOCK} (a block of the KV cache) and "
            f"{most} (max_batch_size x max_seq_len): trtllm-build would choose another"
        )
    if not paged_context and limits.max_num_tokens < limits.max_seq_len:
        raise NvlmError(
            f"max_num_tokens {limits.max_num_tokens} is less than max_seq_len {limits.max_seq_len}, and this "
            "quantization with this kv_cache has no paged context attention, which long prompts in chunks need",
            hint='leave max_num_tokens out, or choose kv_cache = "16bit"',
        )


def _sizes(limits: EngineLimits) -> tuple[Argument, ...]:
    numbers = {
        "max_batch_size": limits.max_batch_size,
        # of no effect with packed input, but its default of 1024 looks like a limit to who reads the engine's config
        "max_input_len": limits.max_seq_len,
        "max_seq_len": limits.max_seq_len,
        "max_beam_width": 1,
        "max_num_tokens": limits.max_num_tokens,
    }
    sizes = [Argument(f"--{name}", str(value), name, value) for name, value in numbers.items()]
    table = Argument(
        "--max_multimodal_len",
        str(limits.prompt_table_rows),
        "max_prompt_embedding_table_size",
        limits.prompt_table_rows,
    )
    return (*sizes, table, Argument("--kv_cache_type", "paged", "kv_cache_type", "PAGED"))


def _plugins(dtype: str, quant_algo: str | None) -> tuple[Argument, ...]:
    # `auto` would be stored as the word `auto`, which could not be compared; FP8 products are TensorRT's own, as
    # --gemm_plugin is for products that are not quantised
    gemm = dtype if quant_algo is None else None
    return (
        Argument("--gpt_attention_plugin", dtype, "plugin_config.gpt_attention_plugin", dtype),
        Argument("--gemm_plugin", gemm or "disable", "plugin_config.gemm_plugin", gemm),
        Argument("--tokens_per_block", str(TOKENS_PER_BLOCK), "plugin_config.tokens_per_block", TOKENS_PER_BLOCK),
    )


def _switch(name: str, on: bool) -> Argument:
    return Argument(f"--{name}", "enable" if on else "disable", f"plugin_config.{name}", on)
