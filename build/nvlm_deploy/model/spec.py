"""ModelSpec: the facts a checkpoint states about itself, from config.json and the safetensors headers. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from nvlm_deploy.errors import NvlmError

# Qwen2.5's tokenizer, which the released checkpoint carries (facts nvlm-d.md section 5)
VISION_PAD = "<|vision_pad|>"
IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# torch's LayerNorm default, which the projector uses in HF and vLLM (Megatron's 1e-6 is another code path)
PROJECTOR_NORM_EPSILON = 1e-5

QKV_NAME = "vision_model.encoder.layers.0.attn.qkv.weight"


@dataclass(frozen=True)
class VisionSpec:
    """InternViT: `heads` are real, `padded_heads` are what the weights hold (25 and 32 in the release)."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    padded_heads: int
    image_size: int
    patch_size: int
    norm_epsilon: float

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.heads

    @property
    def grid(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def positions(self) -> int:
        """Patches of a tile and the class token."""
        return self.grid**2 + 1

    @property
    def attention_width(self) -> int:
        """Channels of q, of k and of v in the weights, dummy heads included."""
        return self.padded_heads * self.head_size


@dataclass(frozen=True)
class ProjectorSpec:
    """mlp1: LayerNorm, Linear, GELU, Linear; no biases on the linears."""

    input_size: int
    hidden_size: int
    output_size: int
    norm_epsilon: float = PROJECTOR_NORM_EPSILON


@dataclass(frozen=True)
class DecoderSpec:
    """A Qwen2 decoder: biases on q, k, v only."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    norm_epsilon: float
    rotary_base: float
    max_positions: int
    tied_embeddings: bool = False

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.heads


@dataclass(frozen=True)
class TilingSpec:
    """How an image becomes tiles of `tile_size` pixels and visual tokens."""

    tile_size: int
    min_tiles: int
    max_tiles: int
    use_thumbnail: bool
    tokens_per_tile: int

    @property
    def max_tiles_with_thumbnail(self) -> int:
        return self.max_tiles + 1 if self.use_thumbnail and self.max_tiles > 1 else self.max_tiles


@dataclass(frozen=True)
class PromptSpec:
    """Where generation ends by default."""

    eos_token_id: int
    bos_token_id: int


@dataclass(frozen=True)
class ModelSpec:
    """All that a checkpoint of NVLM-D's architecture says about its shapes."""

    vision: VisionSpec
    projector: ProjectorSpec
    decoder: DecoderSpec
    tiling: TilingSpec
    prompt: PromptSpec


class HasHeaders(Protocol):
    """What spec_from_checkpoint needs of a checkpoint: its config and the shapes in its headers."""

    @property
    def config(self) -> Mapping[str, Any]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...


def spec_from_checkpoint(checkpoint: HasHeaders) -> ModelSpec:
    """The spec of an opened checkpoint; the padded head count is read from the weights, as the config omits it.

    Raises NvlmError for a checkpoint of another model or a config that contradicts itself.
    """
    _require_nvlm(checkpoint.config)
    vision = _Section(_section(checkpoint.config, "vision_config"), "vision_config")
    hidden, heads = vision.integer("hidden_size"), vision.integer("num_attention_heads")
    return spec_from_config(checkpoint.config, padded_heads=_padded_heads(checkpoint.shape(QKV_NAME), hidden, heads))


def spec_from_config(config: Mapping[str, Any], *, padded_heads: int | None = None) -> ModelSpec:
    """The spec by config.json alone; without `padded_heads` the released rule holds (7 dummy heads, 25 -> 32)."""
    _require_nvlm(config)
    top = _Section(config, "config.json")
    llm = _Section(_section(config, "llm_config"), "llm_config")
    vision = _vision_spec(_Section(_section(config, "vision_config"), "vision_config"), padded_heads)
    decoder = _decoder_spec(llm)
    shuffle = _pixel_shuffle_factor(top)
    _require_divides(vision.grid, shuffle, "patches along a tile", "pixel shuffle factor")
    tiling = TilingSpec(
        tile_size=top.integer("force_image_size", vision.image_size),
        min_tiles=top.integer("min_dynamic_patch", 1),
        max_tiles=top.integer("max_dynamic_patch", 6) if top.get("dynamic_image_size", True) else 1,
        use_thumbnail=bool(top.get("use_thumbnail", True)),
        tokens_per_tile=(vision.grid // shuffle) ** 2,
    )
    if tiling.min_tiles > tiling.max_tiles:
        raise NvlmError(
            f"config.json: min_dynamic_patch {tiling.min_tiles} exceeds max_dynamic_patch {tiling.max_tiles}"
        )
    if tiling.tile_size != vision.image_size:
        raise NvlmError(f"force_image_size is {tiling.tile_size}, vision_config.image_size {vision.image_size}")
    projector = ProjectorSpec(vision.hidden_size * shuffle**2, decoder.intermediate_size, decoder.hidden_size)
    prompt = PromptSpec(llm.integer("eos_token_id"), llm.integer("bos_token_id"))
    return ModelSpec(vision, projector, decoder, tiling, prompt)


def _require_nvlm(config: Mapping[str, Any]) -> None:
    """The release says NVLM_D at the top and, wrongly, model_type `llama` for its Qwen2 decoder (trap 4)."""
    architectures = list(config.get("architectures") or [])
    if architectures != ["NVLM_D"]:
        raise NvlmError(
            f"config.json: architectures is {architectures or 'missing'}, not ['NVLM_D']: another model",
            hint="point at the folder of NVLM-D-72B (or one of its layout); `nvlm inspect FOLDER` prints what it holds",
        )
    decoder = list(_section(config, "llm_config").get("architectures") or [])
    if decoder != ["Qwen2ForCausalLM"]:
        raise NvlmError(f"config.json: llm_config.architectures is {decoder}, expected ['Qwen2ForCausalLM']")


def _section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = config.get(key)
    if not isinstance(section, Mapping):
        raise NvlmError(f"config.json has no section {key!r}", hint="fetch config.json of the checkpoint again")
    return section


@dataclass(frozen=True)
class _Section:
    """Reads numbers out of one section of config.json, naming the key when one is missing or of another type."""

    values: Mapping[str, Any]
    place: str

    def get(self, key: str, default: Any) -> Any:
        return self.values.get(key, default)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.number(key, default)
        if value != int(value):
            raise NvlmError(f"{self.place}.{key} is {value}, expected a whole number")
        return int(value)

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or (value <= 0 and not key.endswith("_id")):
            raise NvlmError(f"{self.place}.{key} is {value!r}, expected a positive number")
        return value


def _vision_spec(section: _Section, padded_heads: int | None) -> VisionSpec:
    heads, hidden = section.integer("num_attention_heads"), section.integer("hidden_size")
    image_size, patch_size = section.integer("image_size"), section.integer("patch_size")
    _require_divides(hidden, heads, "vision_config.hidden_size", "num_attention_heads")
    _require_divides(image_size, patch_size, "vision_config.image_size", "patch_size")
    if not section.get("qk_normalization", True) or section.get("qkv_bias", False):
        raise NvlmError("vision_config: expected qk_normalization true and qkv_bias false, as InternViT-6B-V1-5 has")
    return VisionSpec(
        hidden_size=hidden,
        intermediate_size=section.integer("intermediate_size"),
        layers=section.integer("num_hidden_layers"),
        heads=heads,
        padded_heads=heads + 7 if padded_heads is None else padded_heads,
        image_size=image_size,
        patch_size=patch_size,
        norm_epsilon=section.number("layer_norm_eps", 1e-6),
    )


def _decoder_spec(section: _Section) -> DecoderSpec:
    """Keys the release leaves to the Qwen2 defaults get Qwen2-72B-Instruct's values (facts nvlm-d.md section 1)."""
    heads, hidden = section.integer("num_attention_heads"), section.integer("hidden_size")
    _require_divides(hidden, heads, "llm_config.hidden_size", "num_attention_heads")
    kv_heads = section.integer("num_key_value_heads", heads)
    _require_divides(heads, kv_heads, "llm_config.num_attention_heads", "num_key_value_heads")
    return DecoderSpec(
        vocab_size=section.integer("vocab_size", 152064),
        hidden_size=hidden,
        intermediate_size=section.integer("intermediate_size"),
        layers=section.integer("num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        norm_epsilon=section.number("rms_norm_eps", 1e-6),
        rotary_base=_rotary_base(section),
        max_positions=section.integer("max_position_embeddings", 32768),
        tied_embeddings=bool(section.get("tie_word_embeddings", False)),
    )


def _rotary_base(section: _Section) -> float:
    """transformers 4 writes `rope_theta`; transformers 5 moved it into `rope_parameters`."""
    parameters = section.get("rope_parameters", None)
    if isinstance(parameters, Mapping) and "rope_theta" in parameters:
        return float(parameters["rope_theta"])
    if section.get("rope_scaling", None):
        raise NvlmError(f"llm_config.rope_scaling is {section.get('rope_scaling', None)}: only plain RoPE is supported")
    return section.number("rope_theta", 1_000_000.0)


def _pixel_shuffle_factor(top: _Section) -> int:
    ratio = top.number("downsample_ratio", 0.5)
    version = top.get("ps_version", "v2")
    if version != "v2":
        raise NvlmError(f"config.json: ps_version is {version!r}; NVLM-D is trained with 'v2' (v1 transposes the grid)")
    if top.get("select_layer", -1) != -1:
        raise NvlmError(f"config.json: select_layer is {top.get('select_layer', -1)}; only -1, the last, is supported")
    if ratio != 0.5:
        raise NvlmError(f"config.json: downsample_ratio is {ratio}; only 0.5, four patches a token, is supported")
    return round(1 / ratio)


def _padded_heads(qkv_shape: tuple[int, ...], hidden: int, heads: int) -> int:
    head_size = hidden // heads
    rows = qkv_shape[0] if qkv_shape else 0
    padded, rest = divmod(rows, 3 * head_size)
    if len(qkv_shape) != 2 or qkv_shape[1] != hidden or rest or padded < heads:
        raise NvlmError(
            f"{QKV_NAME} has shape {list(qkv_shape)}; with hidden_size {hidden} and {heads} heads of {head_size} "
            f"it must be [3 * heads * {head_size}, {hidden}] with at least {heads} heads"
        )
    return padded


def _require_divides(whole: int, part: int, whole_name: str, part_name: str) -> None:
    if whole % part:
        raise NvlmError(f"config.json: {whole_name} {whole} is not a multiple of {part_name} {part}")
