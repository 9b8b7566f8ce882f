"""Every key of a checkpoint's files that can change what is computed, and what becomes of it; the one list of them.

A key is honoured as transformers honours it, refused by its name, or has no effect here and is reported. What one key
means depends on another's value in a few cases: these are in relations.py. A key that stands nowhere is listed by
`nvlm inspect` as not known.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain
from typing import Any

from nvlm_deploy.model.foreign.setting import (
    CONFIG,
    GENERATION,
    LLM,
    PREPROCESSOR,
    TOKENIZER,
    TOKENIZER_CONFIG,
    TOKENIZER_MODEL,
    VISION,
    Setting,
    Treatment,
    honoured,
    ignored,
    is_empty,
    only,
    only_empty,
    refused,
    silent,
    with_default,
)

# both config.json and preprocessor_config.json may have them
TILING_KEYS = ("min_dynamic_patch", "max_dynamic_patch", "use_thumbnail", "dynamic_image_size")
# Pillow's number of it
BICUBIC = 3

QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_UNQUANTISED = "start from the unquantised BF16 checkpoint"
_MERGE_LORA = "merge the LoRA weights into the model's, then set the key to 0"
_PRECISION = "the tensors' own types are read, and the profile decides what is computed in"
_GREEDY = "not obeyed: answers are greedy unless the client's request says otherwise"
_CHAT = "not obeyed: the prompt is what the profile's serving.wrapper writes"
_AS_IN_FILE = "the tokenizer does as the file says; NVLM-D's own is another"

# Hugging Face's bookkeeping in every section, and what matters in training, to labels or to the caller's objects only
_INERT = (
    *(
        "architectures",
        "auto_map",
        "model_type",
        "transformers_version",
        "tokenizer_class",
        "finetuning_task",
        "prefix",
    ),
    *("torchscript", "use_bfloat16", "tf_legacy_loss", "return_dict", "return_dict_in_generate", "use_cache"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "problem_type", "num_labels"),
    *("id2label", "label2id", "task_specific_params", "chunk_size_feed_forward", "is_encoder_decoder", "is_decoder"),
    *(
        "add_cross_attention",
        "cross_attention_hidden_size",
        "tie_encoder_decoder",
        "pretraining_tp",
        "attn_implementation",
    ),
    *("attention_dropout", "dropout", "drop_path_rate", "hidden_dropout", "resid_pdrop", "embd_pdrop"),
    *("initializer_factor", "initializer_range", "use_flash_attn", "gradient_checkpointing"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id"),
)

# transformers' defaults (generation/configuration_utils.py): what a file may say without asking for anything
_NEUTRAL_GENERATION: dict[str, tuple[Any, ...]] = {
    "do_sample": (False,),
    "temperature": (1.0,),
    "top_k": (50, 0, 1),
    "top_p": (1.0,),
    "typical_p": (1.0,),
    "min_p": (0.0,),
    "top_h": (),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "renormalize_logits": (False,),
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": ([],),
    "force_words_ids": ([],),
    "constraints": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": ([], {}),
    "token_healing": (False,),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "remove_invalid_values": (False,),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1.0,),
    "watermarking_config": (),
    "max_length": (20,),
    "max_new_tokens": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "max_time": (),
    "stop_strings": ([],),
    "early_stopping": (False,),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "length_penalty": (1.0,),
    "diversity_penalty": (0.0,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0.0,),
    "dola_layers": (),
}

# how transformers does it, not what comes out
_GENERATION_INERT = (
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "compile_config", "disable_compile"),
    *("continuous_batching_config", "low_memory", "prefill_chunk_size", "use_mtp", "is_assistant"),
    *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind"),
    *("target_lookbehind", "assistant_ensemble_weight"),
)

# names and places; relations.py judges chat_template, added_tokens_decoder and additional_special_tokens
_TOKENIZER_CONFIG_INERT = (
    *("chat_template", "added_tokens_decoder", "additional_special_tokens", "extra_special_tokens"),
    *("model_max_length", "tokenizer_class", "auto_map", "name_or_path", "padding_side", "truncation_side"),
    *("processor_class", "use_fast", "legacy", "backend", "is_local", "local_files_only", "model_input_names"),
    *("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token"),
    "model_specific_special_tokens",
)


def _in_every_section() -> Iterator[Setting]:
    """What may stand at the top of config.json and in either section."""
    for place in (CONFIG, LLM, VISION):
        yield from silent(place, *_INERT)
        yield only_empty(place, "quantization_config", why="these weights are quantised already", hint=_UNQUANTISED)
        yield only_empty(place, "pruned_heads", why="heads are pruned by no engine")
        for key in ("torch_dtype", "dtype"):
            yield ignored(place, key, "bfloat16", "torch.bfloat16", "auto", effect=_PRECISION)


def _top() -> Iterator[Setting]:
    yield from silent(CONFIG, LLM, VISION, "force_image_size")
    reason = "NVLM-D is trained with it; v1 transposes the grid"
    yield only(CONFIG, "ps_version", "v2", why=reason, absent="v2 is used, as NVLM-D is trained")
    yield only(CONFIG, "select_layer", -1, why="the projector reads the last layer")
    yield only(CONFIG, "downsample_ratio", 0.5, why="four patches become one token")
    yield only(CONFIG, "tie_word_embeddings", False, why="NVLM-D has an output head of its own")
    for key in ("use_backbone_lora", "use_llm_lora"):
        yield only_empty(CONFIG, key, why="the weights are in LoRA's layout, not merged", hint=_MERGE_LORA)
    yield with_default(CONFIG, "dynamic_image_size", absent="images are tiled, as NVLM-D's are")
    yield with_default(CONFIG, "use_thumbnail", absent="the whole image follows its tiles, as with NVLM-D")
    yield with_default(CONFIG, "min_dynamic_patch", absent="1 is used, the default of the model's own code")
    yield with_default(CONFIG, "max_dynamic_patch", absent="6 is used, the default of the model's own code")
    yield ignored(CONFIG, "template", "chatml", effect=_CHAT)
    yield ignored(CONFIG, "system_message", "", effect=_CHAT)
    yield ignored(CONFIG, "pad2square", False, effect="not obeyed: tiles are cut as NVLM-D's own code cuts them")
    yield from silent(CONFIG, "image_token_index", "image_token_id", "img_context_token_id")


def _llm() -> Iterator[Setting]:
    yield from silent(LLM, "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    # without use_sliding_window nothing reads these two; rope_relations judges the last three
    yield from silent(LLM, "sliding_window", "max_window_layers", "rope_theta", "rope_parameters", "rope_scaling")
    yield with_default(LLM, "vocab_size", absent="the rows of embed_tokens.weight are counted")
    yield with_default(LLM, "num_key_value_heads", absent="the rows of k_proj.weight are counted")
    yield with_default(LLM, "rms_norm_eps", absent="1e-06 is used, transformers' default for Qwen2")
    yield with_default(LLM, "max_position_embeddings", absent="32768 is used, transformers' default for Qwen2")
    yield only(LLM, "tie_word_embeddings", False, why="NVLM-D has an output head of its own")
    yield only(LLM, "hidden_act", "silu", "swish", why="Qwen2 has SwiGLU")
    yield only(LLM, "mlp_bias", False, why="Qwen2 has biases on q, k and v only")
    yield only(LLM, "use_sliding_window", False, why="every layer attends to all tokens before")
    yield refused(LLM, "layer_types", _is_full_attention, why="every layer attends to all tokens before")
    yield only(LLM, "partial_rotary_factor", 1, why="all channels of a head are rotated")
    for key in ("qk_norm", "use_qk_norm", "use_mrope"):
        yield only(LLM, key, False, why="Qwen2 has none")
    effect = "not obeyed: as in transformers, Qwen2 has biases on q, k and v whatever the key says"
    yield ignored(LLM, "attention_bias", True, effect=effect)


def _vision() -> Iterator[Setting]:
    yield from silent(VISION, "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    yield from silent(VISION, "image_size", "patch_size")
    yield with_default(VISION, "layer_norm_eps", absent="1e-06 is used, the default of InternViT's own code")
    yield only(VISION, "qk_normalization", True, why="InternViT-6B-V1-5 normalises q and k")
    yield only(VISION, "qkv_bias", False, why="InternViT-6B-V1-5 has no bias on qkv")
    yield only(VISION, "norm_type", "rms_norm", why="InternViT-6B-V1-5 has no other")
    yield only(VISION, "hidden_act", "gelu", why="InternViT-6B-V1-5 has the exact GELU")
    yield only(VISION, "num_channels", 3, why="tiles are RGB")
    yield only(VISION, "use_moe", False, why="InternViT-6B-V1-5 has no experts")


def _generation() -> Iterator[Setting]:
    """transformers takes these from config.json too where there is no generation_config.json."""
    yield from silent(GENERATION, *_GENERATION_INERT, *_INERT)
    for place in (GENERATION, CONFIG, LLM):
        for key, neutral in _NEUTRAL_GENERATION.items():
            yield ignored(place, key, *neutral, effect=_GREEDY)
    yield from silent(VISION, *_NEUTRAL_GENERATION)


def _tokenizer() -> Iterator[Setting]:
    """What the tokenizers library does with tokenizer.json; relations.py judges added tokens and vocabulary."""
    yield from silent(TOKENIZER, "version", "added_tokens", "model")
    for key in ("truncation", "padding"):
        effect = "left over from training: switched off, as transformers does with every call"
        yield ignored(TOKENIZER, key, effect=effect)
    for key, is_plain in (("normalizer", _is_nfc), ("pre_tokenizer", _is_qwen2_pre_tokenizer)):
        yield honoured(TOKENIZER, key, is_plain, effect=_AS_IN_FILE, absent="none is applied, as in transformers")
    effect = "not obeyed: no token is added to the prompt that the profile's serving.wrapper writes"
    yield Setting(TOKENIZER, "post_processor", Treatment.NEUTRALISED, _adds_no_token, effect)
    yield refused(TOKENIZER, "decoder", _is_byte_level, why="only ByteLevel is supported: tokens are bytes of text")
    yield from silent(TOKENIZER_MODEL, "vocab", "merges", "cache_capacity")
    yield only(TOKENIZER_MODEL, "type", "BPE", why="NVLM-D's tokenizer is byte-level BPE")
    effect = "left over from training: switched off, since the same text would become other tokens each time"
    yield ignored(TOKENIZER_MODEL, "dropout", 0.0, effect=effect)
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        yield only_empty(TOKENIZER_MODEL, key, why="byte-level BPE has none, and text would be lost")
    for key in ("byte_fallback", "ignore_merges", "unk_token", "fuse_unk"):
        yield honoured(TOKENIZER_MODEL, key, is_empty, effect=_AS_IN_FILE)


def _tokenizer_config() -> Iterator[Setting]:
    """Nothing here reads this file: what transformers' tokenizer would do otherwise is said."""
    yield from silent(TOKENIZER_CONFIG, *_TOKENIZER_CONFIG_INERT)
    for key in ("add_bos_token", "add_eos_token", "split_special_tokens", "tokenizer_file", "vocab_file"):
        yield ignored(TOKENIZER_CONFIG, key, False, effect=_CHAT)
    for key in ("add_prefix_space", "do_lower_case", "trim_offsets"):
        yield ignored(TOKENIZER_CONFIG, key, False, effect="not obeyed: tokenizer.json alone is read")
    effect = "not obeyed: an answer's text is what its tokens say"
    yield ignored(TOKENIZER_CONFIG, "clean_up_tokenization_spaces", False, effect=effect)
    yield ignored(TOKENIZER_CONFIG, "errors", "replace", effect="not obeyed: bytes that are no UTF-8 become U+FFFD")


def _preprocessor() -> Iterator[Setting]:
    """The graph normalises, the server tiles; relations.py compares means, deviations and sizes with the model's."""
    kinds = ("feature_extractor_type", "image_processor_type", "processor_class", "auto_map")
    yield from silent(PREPROCESSOR, *kinds, "do_center_crop", "data_format", "input_data_format", "device")
    yield from silent(PREPROCESSOR, "image_mean", "image_std", "size", "crop_size", *TILING_KEYS)
    reason = "only 1/255 is supported: the engine normalises tiles with it"
    yield refused(PREPROCESSOR, "rescale_factor", _is_a_255th, why=reason)
    yield only(PREPROCESSOR, "resample", BICUBIC, None, why="tiles are resized with bicubic interpolation")
    for key in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        yield only(PREPROCESSOR, key, True, None, why="tiles are always RGB, resized and normalised")


def _is_full_attention(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(one == "full_attention" for one in value))


def _is_nfc(value: Any) -> bool:
    return bool(value == {"type": "NFC"})


def _is_qwen2_pre_tokenizer(value: Any) -> bool:
    """Qwen2's split, then bytes, with no space put in front."""
    parts = value.get("pretokenizers") if isinstance(value, dict) else None
    if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, dict) for part in parts):
        return False
    split, to_bytes = parts
    splits = split.get("pattern") == {"Regex": QWEN2_SPLIT} and split.get("behavior") == "Isolated"
    bytes_alone = to_bytes.get("type") == "ByteLevel" and not to_bytes.get("add_prefix_space")
    return splits and not split.get("invert") and bytes_alone and not to_bytes.get("use_regex", True)


def _adds_no_token(value: Any) -> bool:
    """ByteLevel only moves offsets; the others write tokens around a text."""
    if isinstance(value, dict) and value.get("type") == "Sequence":
        return all(_adds_no_token(part) for part in value.get("processors") or [])
    return isinstance(value, dict) and value.get("type") == "ByteLevel"


def _is_byte_level(value: Any) -> bool:
    return isinstance(value, dict) and value.get("type") == "ByteLevel"


def _is_a_255th(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and math.isclose(value, 1 / 255, rel_tol=1e-6))


_SECTIONS = (_in_every_section, _top, _llm, _vision, _generation, _tokenizer, _tokenizer_config, _preprocessor)
TABLE: tuple[Setting, ...] = tuple(chain.from_iterable(section() for section in _SECTIONS))
KNOWN = frozenset((setting.place, setting.key) for setting in TABLE)
