"""The tensors and quantisation documents of a unified Hugging Face folder of NVLM-D, as engines read it. No torch.

Source: contract section D, and what ModelOpt 0.47 `export_hf_checkpoint` writes. Names are the released checkpoint's;
an FP8 weight has its scales beside it. Encoder, projector, embeddings and head are not quantised.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

from nvlm_deploy.checkpoint.stream import Tensors, tensor_bytes
from nvlm_deploy.checkpoint.trtllm_layout import FP8, Layout
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.model.inventory import PARTS, Shape, expected_tensors
from nvlm_deploy.model.spec import ModelSpec

WEIGHT_SCALE, INPUT_SCALE, KEY_SCALE, VALUE_SCALE = "weight_scale", "input_scale", "k_scale", "v_scale"
QUANT_CONFIG_NAME = "hf_quant_config.json"
# what transformers' and ModelOpt's own writers keep a shard below
MAX_SHARD_BYTES = 5_000_000_000
# Names the format, not the maker: vLLM's and SGLang's older readers refuse other names
_PRODUCER = {"name": "modelopt", "version": "0.47.0"}
_DECODER = PARTS["language_model"]
# a whole part ends in `*`, as in ModelOpt's own lists
_EXCLUDED = sorted(
    [f"{_DECODER}lm_head", f"{_DECODER}model.embed_tokens"]
    + [f"{prefix.removesuffix('.')}*" for prefix in PARTS.values() if prefix != _DECODER]
)
_E4M3 = {"dynamic": False, "num_bits": 8, "type": "float"}


@dataclass(frozen=True)
class HfTensor:
    """One tensor; `dtype` is safetensors' name."""

    name: str
    dtype: str
    shape: Shape

    @property
    def size_bytes(self) -> int:
        return tensor_bytes(self.dtype, self.shape)


@dataclass(frozen=True)
class HfUnit:
    """A tensor of the source as it is written, and the scales that one pass over it gives, by their last names.

    They lie in one shard.
    """

    tensor: HfTensor
    scales: Mapping[str, HfTensor]

    @property
    def tensors(self) -> list[HfTensor]:
        return [self.tensor, *self.scales.values()]

    @property
    def is_quantised(self) -> bool:
        return self.tensor.dtype == "F8_E4M3"

    @property
    def is_of_decoder(self) -> bool:
        return self.tensor.name.startswith(_DECODER)


@dataclass(frozen=True)
class HfLayout:
    """What the folder holds. `carried` are the dtypes of the encoder's and projector's tensors, which stay theirs.

    `quant_algo` and `kv_cache_quant_algo` are as in trtllm_layout.Layout, whose NvlmErrors apply. Raises NvlmError as
    well for an FP8 KV cache beside BF16 weights: engines read no scales where no `quant_algo` is named.
    """

    spec: ModelSpec
    carried: Mapping[str, str]
    quant_algo: str | None = None
    kv_cache_quant_algo: str | None = None
    max_shard_bytes: int = MAX_SHARD_BYTES

    def __post_init__(self) -> None:
        Layout(self.spec.decoder, self.quant_algo, kv_cache_quant_algo=self.kv_cache_quant_algo)
        if self.kv_cache_quant_algo and not self.quant_algo:
            raise NvlmError(
                "an FP8 KV cache beside BF16 weights has no place in a Hugging Face folder",
                hint="write the folder with a 16-bit cache and start the engine with an FP8 one: "
                "`vllm serve FOLDER --kv-cache-dtype fp8`",
            )

    @cached_property
    def units(self) -> list[HfUnit]:
        """All, in the order of the released names."""
        return [self._unit(name, shape) for name, shape in expected_tensors(self.spec).items()]

    @cached_property
    def shards(self) -> dict[str, Tensors]:
        """File name -> what is in it: at most max_shard_bytes, or one unit."""
        groups = list(_groups(self.units, self.max_shard_bytes))
        return {
            f"model-{number:05d}-of-{len(groups):05d}.safetensors": {
                tensor.name: (tensor.dtype, tensor.shape) for unit in group for tensor in unit.tensors
            }
            for number, group in enumerate(groups, start=1)
        }

    @property
    def index(self) -> dict[str, Any]:
        """model.safetensors.index.json."""
        total = sum(tensor.size_bytes for unit in self.units for tensor in unit.tensors)
        weight_map = {name: shard for shard, tensors in self.shards.items() for name in tensors}
        return {"metadata": {"total_size": total}, "weight_map": weight_map}

    @property
    def quant_config(self) -> dict[str, Any] | None:
        """hf_quant_config.json, which TensorRT-LLM reads (contract D.1); none for BF16."""
        if self.quant_algo is None:
            return None
        return {
            "producer": _PRODUCER,
            "quantization": {
                "quant_algo": self.quant_algo,
                "kv_cache_quant_algo": self.kv_cache_quant_algo,
                "exclude_modules": _EXCLUDED,
            },
        }

    @property
    def quantization_config(self) -> dict[str, Any] | None:
        """The same as a key of config.json, which vLLM reads; `config_groups` for FP8 only, as ModelOpt writes it."""
        if self.quant_algo is None:
            return None
        group = {"input_activations": _E4M3, "weights": _E4M3, "targets": ["Linear"]}
        return {
            **({"config_groups": {"group_0": group}} if self.quant_algo == FP8 else {}),
            "ignore": _EXCLUDED,
            "quant_algo": self.quant_algo,
            **({"kv_cache_scheme": _E4M3} if self.kv_cache_quant_algo else {}),
            "producer": _PRODUCER,
            "quant_method": "modelopt",
        }

    def _unit(self, name: str, shape: Shape) -> HfUnit:
        if not name.startswith(_DECODER):
            return HfUnit(HfTensor(name, self.carried[name], shape), {})
        module = name.removesuffix(".weight")
        if self.quant_algo is None or len(shape) != 2 or module in _EXCLUDED:
            return HfUnit(HfTensor(name, "BF16", shape), {})
        scales = {kind: HfTensor(f"{module}.{kind}", "F32", at) for kind, at in self._scales(module, shape[0])}
        return HfUnit(HfTensor(name, "F8_E4M3", shape), scales)

    def _scales(self, module: str, outputs: int) -> Iterator[tuple[str, Shape]]:
        if self.quant_algo == FP8:
            yield WEIGHT_SCALE, ()
            yield INPUT_SCALE, ()
        else:
            yield WEIGHT_SCALE, (outputs,)
        if self.kv_cache_quant_algo:
            yield from {"k_proj": [(KEY_SCALE, ())], "v_proj": [(VALUE_SCALE, ())]}.get(module.rpartition(".")[2], [])


def _groups(units: Iterable[HfUnit], max_bytes: int) -> Iterator[list[HfUnit]]:
    group: list[HfUnit] = []
    filled = 0
    for unit in units:
        size = sum(tensor.size_bytes for tensor in unit.tensors)
        if group and filled + size > max_bytes:
            yield group
            group, filled = [], 0
        group.append(unit)
        filled += size
    yield group


def require_layout(found: Mapping[str, tuple[str, Shape]], layout: HfLayout) -> None:
    """Raises NvlmError naming the first tensor that is missing, unexpected, or of another (dtype, shape)."""
    expected: Tensors = dict(chain.from_iterable(tensors.items() for tensors in layout.shards.values()))
    for state, names in (("lacks", expected.keys() - found.keys()), ("has besides", found.keys() - expected.keys())):
        if names:
            raise NvlmError(f"the folder {state} {len(names)} tensor(s), first {min(names)}")
    for name, (dtype, shape) in expected.items():
        if found[name] != (dtype, shape):
            has = f"{found[name][0]} {list(found[name][1])}"
            raise NvlmError(f"{name} is {has}, expected {dtype} {list(shape)}")
