"""The tensors of a TensorRT-LLM checkpoint of a Qwen2 decoder: names, types, shapes, and which rows each rank has.

The one description from which writing, checking and merging all follow; source: contract section A. No torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.model.spec import DecoderSpec

# TensorRT-LLM's names: one static scale a tensor; one a weight's row, with activations scaled per token at run time
FP8, FP8_PER_CHANNEL = "FP8", "FP8_PER_CHANNEL_PER_TOKEN"
QUANT_ALGOS = (None, FP8, FP8_PER_CHANNEL)
KV_CACHE_QUANT_ALGOS = (None, FP8)
WEIGHTS_SCALE, ACTIVATION_SCALE = "weights_scaling_factor", "activation_scaling_factor"
PER_CHANNEL_SCALE, KV_CACHE_SCALE = "per_channel_scale", "kv_cache_scaling_factor"
_LAYER_PREFIX = "transformer.layers."


class Split(Enum):
    """How the tensor-parallel ranks share a tensor (contract A.8)."""

    WHOLE = "every rank has all of it"
    ROWS = "equal runs of axis 0"
    COLUMNS = "equal runs of axis 1"
    VOCABULARY = "runs of ceil(vocabulary / ranks) rows, zeros after the last"
    QKV = "each rank's own query, key and value heads; key and value heads repeated when ranks outnumber them"

    @property
    def axis(self) -> int:
        return 1 if self is Split.COLUMNS else 0


@dataclass(frozen=True)
class Parallelism:
    """Tensor-parallel ranks within each of the pipeline's stages; rank = stage * tensor + tensor rank."""

    tensor: int = 1
    pipeline: int = 1

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline

    def stage_layers(self, layers: int, stage: int) -> range:
        """Global layer indices of a stage; the first stages take the rest, as torch.tensor_split does."""
        size, rest = divmod(layers, self.pipeline)
        start = stage * size + min(stage, rest)
        return range(start, start + size + (stage < rest))


SINGLE = Parallelism()


@dataclass(frozen=True)
class LayoutTensor:
    """One tensor as it is without parallelism; `dtype` is safetensors' name.

    `sources` are the Hugging Face tensors whose rows, one after the other, are its rows; none for a scale.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    split: Split = Split.WHOLE
    sources: tuple[str, ...] = ()

    def held(self, spec: DecoderSpec, tensor_rank: int, tensor_parallel: int) -> list[range]:
        """Runs along the split axis that a rank has, in its order; a run that passes the end is padded with zeros."""
        extent = self.shape[self.split.axis]
        if self.split is Split.WHOLE:
            return [range(extent)]
        if self.split is Split.QKV:
            return _held_heads(spec, tensor_rank, tensor_parallel)
        size = -(-extent // tensor_parallel)
        return [range(tensor_rank * size, (tensor_rank + 1) * size)]

    def source_rows(self, spec: DecoderSpec) -> list[int]:
        """Rows that each of `sources` gives."""
        if self.split is Split.QKV:
            return [heads * spec.head_size for heads in (spec.heads, spec.kv_heads, spec.kv_heads)]
        return [self.shape[0]]

    def shape_on_rank(self, spec: DecoderSpec, tensor_rank: int, tensor_parallel: int) -> tuple[int, ...]:
        shape = list(self.shape)
        shape[self.split.axis] = sum(len(run) for run in self.held(spec, tensor_rank, tensor_parallel))
        return tuple(shape)


@dataclass(frozen=True)
class Layout:
    """What config.json decides about the rank files. Raises NvlmError for a split the model does not allow."""

    spec: DecoderSpec
    quant_algo: str | None = None
    parallelism: Parallelism = SINGLE
    kv_cache_quant_algo: str | None = None

    def __post_init__(self) -> None:
        _require_known("quant_algo", self.quant_algo, QUANT_ALGOS)
        _require_known("kv_cache_quant_algo", self.kv_cache_quant_algo, KV_CACHE_QUANT_ALGOS)
        spec = self.spec
        heads = f"{spec.heads} heads, {spec.kv_heads} key/value heads and intermediate size {spec.intermediate_size}"
        _require_legal("tensor_parallel", self.parallelism.tensor, legal_tensor_parallel(spec), heads)
        stages = list(range(1, spec.layers + 1))
        _require_legal("pipeline_parallel", self.parallelism.pipeline, stages, f"{spec.layers} layers")

    def layer(self, index: int) -> list[LayoutTensor]:
        """Tensors of the layer with this number in the whole decoder."""
        source = f"model.layers.{index}."
        return [
            LayoutTensor(
                f"{_LAYER_PREFIX}{index}.{tensor.name}",
                tensor.dtype,
                tensor.shape,
                tensor.split,
                tuple(source + name for name in tensor.sources),
            )
            for tensor in _layer_tensors(self.spec, self.quant_algo, self.kv_cache_quant_algo)
        ]

    @property
    def before_layers(self) -> list[LayoutTensor]:
        """Of the first stage."""
        shape = (self.spec.vocab_size, self.spec.hidden_size)
        return [_bf16("transformer.vocab_embedding.weight", shape, Split.VOCABULARY, "model.embed_tokens.weight")]

    @property
    def after_layers(self) -> list[LayoutTensor]:
        """Of the last stage."""
        shape = (self.spec.vocab_size, self.spec.hidden_size)
        return [
            _bf16("transformer.ln_f.weight", shape[1:], Split.WHOLE, "model.norm.weight"),
            _bf16("lm_head.weight", shape, Split.VOCABULARY, "lm_head.weight"),
        ]

    @property
    def tensors(self) -> list[LayoutTensor]:
        """All, in the order of the computation."""
        layers = [tensor for index in range(self.spec.layers) for tensor in self.layer(index)]
        return self.before_layers + layers + self.after_layers

    def stage_of(self, name: str) -> int:
        """The pipeline stage that has a tensor."""
        index = _layer_index(name)
        if index is None:
            return 0 if name == self.before_layers[0].name else self.parallelism.pipeline - 1
        stages = range(self.parallelism.pipeline)
        return next(stage for stage in stages if index in self.parallelism.stage_layers(self.spec.layers, stage))

    def name_on_stage(self, name: str) -> str:
        """Layers are numbered from 0 within each stage's files."""
        index = _layer_index(name)
        if index is None:
            return name
        start = self.parallelism.stage_layers(self.spec.layers, self.stage_of(name)).start
        return name.replace(f"{_LAYER_PREFIX}{index}.", f"{_LAYER_PREFIX}{index - start}.", 1)

    def ranks_of(self, name: str) -> range:
        """The ranks that have a tensor or their part of it, in tensor-parallel order."""
        first = self.stage_of(name) * self.parallelism.tensor
        return range(first, first + self.parallelism.tensor)

    def rank_tensors(self, rank: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> (dtype, shape) of exactly what `rank{rank}.safetensors` must hold."""
        tensor_rank = rank % self.parallelism.tensor
        return {
            self.name_on_stage(tensor.name): (
                tensor.dtype,
                tensor.shape_on_rank(self.spec, tensor_rank, self.parallelism.tensor),
            )
            for tensor in self.tensors
            if rank in self.ranks_of(tensor.name)
        }


def rank_file(rank: int) -> str:
    return f"rank{rank}.safetensors"


def legal_tensor_parallel(spec: DecoderSpec) -> list[int]:
    """Rank counts that share heads and MLP channels equally; key/value heads divide or are repeated evenly.

    The vocabulary forbids none: it is padded to a multiple of the ranks (contract A.8).
    """
    return [
        ranks
        for ranks in range(1, spec.heads + 1)
        if spec.heads % ranks == 0
        and spec.intermediate_size % ranks == 0
        and (spec.kv_heads % ranks == 0 or ranks % spec.kv_heads == 0)
    ]


def _require_known(what: str, value: str | None, known: tuple[str | None, ...]) -> None:
    if value not in known:
        names = ", ".join(repr(name) for name in known if name)
        raise NvlmError(f"{what} is {value!r}; supported: {names} and null")


def _require_legal(what: str, value: int, legal: list[int], of: str) -> None:
    if value not in legal:
        every = f"1 to {legal[-1]}" if len(legal) == legal[-1] else ", ".join(map(str, legal))
        raise NvlmError(f"{what} {value} cannot share {of}", hint=f"legal: {every}")


def _bf16(name: str, shape: tuple[int, ...], split: Split, *sources: str) -> LayoutTensor:
    return LayoutTensor(name, "BF16", shape, split, sources)


def _layer_tensors(
    spec: DecoderSpec, quant_algo: str | None, kv_cache_quant_algo: str | None
) -> Iterator[LayoutTensor]:
    """Tensors of one layer, named within it (contract A.5).

    `mlp.fc` is Hugging Face's gate_proj and `mlp.gate` its up_proj: swapping them goes unnoticed and ruins the output.
    """
    hidden, inner, queries = spec.hidden_size, spec.intermediate_size, spec.heads * spec.head_size
    fused = queries + 2 * spec.kv_heads * spec.head_size
    projections = [f"self_attn.{which}_proj" for which in "qkv"]
    yield _bf16("input_layernorm.weight", (hidden,), Split.WHOLE, "input_layernorm.weight")
    yield _bf16("attention.qkv.bias", (fused,), Split.QKV, *(f"{name}.bias" for name in projections))
    yield _bf16("post_layernorm.weight", (hidden,), Split.WHOLE, "post_attention_layernorm.weight")
    linears: list[tuple[str, tuple[int, int], Split, list[str]]] = [
        ("attention.qkv", (fused, hidden), Split.QKV, projections),
        ("attention.dense", (hidden, queries), Split.COLUMNS, ["self_attn.o_proj"]),
        ("mlp.fc", (inner, hidden), Split.ROWS, ["mlp.gate_proj"]),
        ("mlp.gate", (inner, hidden), Split.ROWS, ["mlp.up_proj"]),
        ("mlp.proj", (hidden, inner), Split.COLUMNS, ["mlp.down_proj"]),
    ]
    for name, shape, split, sources in linears:
        dtype = "F8_E4M3" if quant_algo else "BF16"
        yield LayoutTensor(f"{name}.weight", dtype, shape, split, tuple(f"{source}.weight" for source in sources))
        yield from _linear_scales(name, shape[0], split, quant_algo)
    if kv_cache_quant_algo:
        yield LayoutTensor(f"attention.{KV_CACHE_SCALE}", "F32", (1,))


def _linear_scales(name: str, outputs: int, split: Split, quant_algo: str | None) -> Iterator[LayoutTensor]:
    """A scale a row goes where its row goes; ranks that share the columns have all rows."""
    if quant_algo == FP8:
        yield LayoutTensor(f"{name}.{WEIGHTS_SCALE}", "F32", (1,))
        yield LayoutTensor(f"{name}.{ACTIVATION_SCALE}", "F32", (1,))
    if quant_algo == FP8_PER_CHANNEL:
        rows = Split.WHOLE if split is Split.COLUMNS else split
        yield LayoutTensor(f"{name}.{PER_CHANNEL_SCALE}", "F32", (outputs,), rows)


def _held_heads(spec: DecoderSpec, tensor_rank: int, tensor_parallel: int) -> list[range]:
    """A rank's rows of the fused projection, whose rows are all q, then all k, then all v."""
    queries, keys = spec.heads // tensor_parallel, max(1, spec.kv_heads // tensor_parallel)
    first_key = tensor_rank * spec.kv_heads // tensor_parallel
    runs = [
        (tensor_rank * queries, queries),
        (spec.heads + first_key, keys),
        (spec.heads + spec.kv_heads + first_key, keys),
    ]
    return [range(first * spec.head_size, (first + heads) * spec.head_size) for first, heads in runs]


def _layer_index(name: str) -> int | None:
    if not name.startswith(_LAYER_PREFIX):
        return None
    return int(name.removeprefix(_LAYER_PREFIX).split(".", 1)[0])
