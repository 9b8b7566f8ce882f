"""ModelSpec: the facts a checkpoint states about itself, from config.json and the safetensors headers. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.model.config_section import ConfigSection
from nvlm_deploy.model.ends import end_ids, pad_id, settings_of_generation
from nvlm_deploy.model.foreign.setting import Documents, findings_of, require_none_refused
from nvlm_deploy.model.foreign.table import TABLE

# Qwen2.5's tokenizer, which the released checkpoint carries (facts nvlm-d.md section 5)
VISION_PAD = "<|vision_pad|>"
IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# torch's LayerNorm default, which the projector uses in HF and vLLM (Megatron's 1e-6 is another code path)
PROJECTOR_NORM_EPSILON = 1e-5

# a square of so many patches a side becomes one token
PIXEL_SHUFFLE = 2

# far beyond any model of this kind, small enough that whatever is derived from it is derived at once
MOST_LAYERS = 512
MOST_HEADS = 4_096
MOST_WIDTH = 1_000_000
MOST_PIXELS = 8_192
MOST_TILES = 128
MOST_TOKENS = 100_000_000

QKV_NAME = "vision_model.encoder.layers.0.attn.qkv.weight"
EMBEDDINGS_NAME = "language_model.model.embed_tokens.weight"
KEYS_NAME = "language_model.model.layers.0.self_attn.k_proj.weight"

ROPE_PLACES = ("rope_scaling", "rope_parameters")
# transformers' default for Qwen2, and not the released model's 1,000,000
DEFAULT_ROTARY_BASE = 10_000.0


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
    """Where generation ends: `eos_token_id` is the end of a turn (`<|im_end|>`), `eos_token_ids` are all end ids.

    `pad_token_id` fills batches up; no result depends on it.
    """

    eos_token_id: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int


@dataclass(frozen=True)
class ModelSpec:
    """All that a checkpoint of NVLM-D's architecture says about its shapes."""

    vision: VisionSpec
    projector: ProjectorSpec
    decoder: DecoderSpec
    tiling: TilingSpec
    prompt: PromptSpec


class HasHeaders(Protocol):
    """What spec_from_checkpoint needs of a checkpoint: settings, ids of its tokenizer, shapes from its headers."""

    @property
    def config(self) -> Mapping[str, Any]: ...

    @property
    def generation(self) -> Mapping[str, Any]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def added_token_id(self, content: str) -> int | None: ...


def spec_from_checkpoint(checkpoint: HasHeaders) -> ModelSpec:
    """The spec of an opened checkpoint; what its config omits is read from the weights, as the padded head count.

    Raises NvlmError for a checkpoint of another model, a setting that is not supported, or a config that contradicts
    itself.
    """
    require_nvlm(checkpoint.config)
    heads, hidden = _heads_and_width(ConfigSection(checkpoint.config).section("vision_config"))
    padded_heads = _padded_heads(checkpoint.shape(QKV_NAME), hidden, heads)
    spec = spec_from_config(_with_sizes_of_weights(checkpoint), padded_heads=padded_heads)
    turn_end, vocab_size = checkpoint.added_token_id(IM_END), spec.decoder.vocab_size
    return replace(spec, prompt=_prompt_spec(checkpoint.config, checkpoint.generation, vocab_size, turn_end))


def spec_from_config(config: Mapping[str, Any], *, padded_heads: int | None = None) -> ModelSpec:
    """The spec by config.json alone; without `padded_heads` the released rule holds (7 dummy heads, 25 -> 32).

    Raises NvlmError as `spec_from_checkpoint`, and for a missing size that only the weights tell.
    """
    top = ConfigSection(config)
    require_nvlm(config)
    require_none_refused(findings_of(TABLE, Documents.of_config(config)))
    llm = top.section("llm_config")
    vision = _vision_spec(top.section("vision_config"), padded_heads)
    decoder = _decoder_spec(llm)
    _require_divides(vision.grid, PIXEL_SHUFFLE, "patches along a tile", "pixel shuffle factor")
    projector = ProjectorSpec(vision.hidden_size * PIXEL_SHUFFLE**2, decoder.intermediate_size, decoder.hidden_size)
    return ModelSpec(
        vision, projector, decoder, _tiling_spec(top, vision), _prompt_spec(config, {}, decoder.vocab_size)
    )


def require_nvlm(config: Mapping[str, Any]) -> None:
    """Raises NvlmError for a config.json of another model.

    The release says NVLM_D at the top and, wrongly, model_type `llama` for its Qwen2 decoder (trap 4).
    """
    architectures = config.get("architectures", "missing")
    if architectures != ["NVLM_D"]:
        raise NvlmError(
            f"config.json: architectures is {architectures}, not ['NVLM_D']: another model",
            hint="point at the folder of NVLM-D-72B (or one of its layout); `nvlm inspect FOLDER` prints what it holds",
        )
    decoder = ConfigSection(config).section("llm_config").values.get("architectures", "missing")
    if decoder != ["Qwen2ForCausalLM"]:
        raise NvlmError(f"config.json: llm_config.architectures is {decoder}, expected ['Qwen2ForCausalLM']")


def _with_sizes_of_weights(checkpoint: HasHeaders) -> Mapping[str, Any]:
    """config.json, with the sizes that it leaves out counted in the weights; transformers' defaults are of no model."""
    llm = dict(ConfigSection(checkpoint.config).section("llm_config").values)
    heads, hidden = _heads_and_width(ConfigSection(llm, "llm_config"))
    if "vocab_size" not in llm:
        llm["vocab_size"] = checkpoint.shape(EMBEDDINGS_NAME)[0]
    if "num_key_value_heads" not in llm:
        llm["num_key_value_heads"] = checkpoint.shape(KEYS_NAME)[0] // max(1, hidden // heads)
    return {**checkpoint.config, "llm_config": llm}


def _heads_and_width(section: ConfigSection) -> tuple[int, int]:
    return section.integer("num_attention_heads", most=MOST_HEADS), section.integer("hidden_size", most=MOST_WIDTH)


def _vision_spec(section: ConfigSection, padded_heads: int | None) -> VisionSpec:
    heads, hidden = _heads_and_width(section)
    image_size = section.integer("image_size", most=MOST_PIXELS)
    patch_size = section.integer("patch_size", most=MOST_PIXELS)
    _require_divides(hidden, heads, "vision_config.hidden_size", "num_attention_heads")
    _require_divides(image_size, patch_size, "vision_config.image_size", "patch_size")
    return VisionSpec(
        hidden_size=hidden,
        intermediate_size=section.integer("intermediate_size", most=MOST_WIDTH),
        layers=section.integer("num_hidden_layers", most=MOST_LAYERS),
        heads=heads,
        padded_heads=heads + 7 if padded_heads is None else padded_heads,
        image_size=image_size,
        patch_size=patch_size,
        norm_epsilon=section.number("layer_norm_eps", 1e-6),
    )


def _decoder_spec(section: ConfigSection) -> DecoderSpec:
    """Keys that are missing have transformers' defaults for Qwen2, but no size has one: weights would not fit it."""
    heads, hidden = _heads_and_width(section)
    _require_divides(hidden, heads, "llm_config.hidden_size", "num_attention_heads")
    _require_divides(hidden // heads, 2, "the decoder's head size", "the pairs of channels that RoPE rotates,")
    null = section.is_null("num_key_value_heads")
    kv_heads = heads if null else section.integer("num_key_value_heads", most=MOST_HEADS)
    _require_divides(heads, kv_heads, "llm_config.num_attention_heads", "num_key_value_heads")
    section.require("head_dim", hidden // heads, "heads share hidden_size equally")
    return DecoderSpec(
        vocab_size=section.integer("vocab_size", most=MOST_TOKENS),
        hidden_size=hidden,
        intermediate_size=section.integer("intermediate_size", most=MOST_WIDTH),
        layers=section.integer("num_hidden_layers", most=MOST_LAYERS),
        heads=heads,
        kv_heads=kv_heads,
        norm_epsilon=section.number("rms_norm_eps", 1e-6),
        rotary_base=_rotary_base(section),
        max_positions=section.integer("max_position_embeddings", 32768, most=MOST_TOKENS),
    )


def _rotary_base(section: ConfigSection) -> float:
    """As transformers reads it: `rope_scaling`, else `rope_parameters`, holds the base, else `rope_theta` does.

    transformers 4 writes `rope_theta`, transformers 5 `rope_parameters` (modeling_rope_utils.py).
    """
    place = next((key for key in ROPE_PLACES if section.has(key)), None)
    parameters = ConfigSection({}) if place is None else section.section(place)
    kind = parameters.values.get("rope_type") or parameters.values.get("type") or "default"
    by_layer = [key for key, value in parameters.values.items() if isinstance(value, Mapping)]
    if kind != "default" or by_layer:
        said = f"rope_type is {kind!r}" if kind != "default" else f"{by_layer[0]} has parameters of its own"
        raise NvlmError(f"llm_config.{place}: {said}; only plain RoPE, the same in every layer, is supported")
    return (parameters if parameters.has("rope_theta") else section).number("rope_theta", DEFAULT_ROTARY_BASE)


def _tiling_spec(top: ConfigSection, vision: VisionSpec) -> TilingSpec:
    null = top.is_null("force_image_size")  # the default of the model's own code
    most_tiles = top.integer("max_dynamic_patch", 6, most=MOST_TILES)
    tiling = TilingSpec(
        tile_size=vision.image_size if null else top.integer("force_image_size", vision.image_size, most=MOST_PIXELS),
        min_tiles=top.integer("min_dynamic_patch", 1, most=MOST_TILES),
        max_tiles=most_tiles if top.flag("dynamic_image_size", True) else 1,
        use_thumbnail=top.flag("use_thumbnail", True),
        tokens_per_tile=(vision.grid // PIXEL_SHUFFLE) ** 2,
    )
    if tiling.min_tiles > tiling.max_tiles:
        raise NvlmError(
            f"config.json: min_dynamic_patch {tiling.min_tiles} exceeds max_dynamic_patch {tiling.max_tiles}"
        )
    if tiling.tile_size != vision.image_size:
        raise NvlmError(f"force_image_size is {tiling.tile_size}, vision_config.image_size {vision.image_size}")
    return tiling


def _prompt_spec(
    config: Mapping[str, Any], generation: Mapping[str, Any], vocab_size: int, turn_end: int | None = None
) -> PromptSpec:
    """The first end id stands for the turn's where the tokenizer's own (`turn_end`) is unknown or not among them."""
    places = settings_of_generation(config, generation)
    ends = end_ids(places, vocab_size)
    end = turn_end if turn_end in ends else ends[0]
    return PromptSpec(end, ends, pad_id(places, vocab_size, default=end))


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
