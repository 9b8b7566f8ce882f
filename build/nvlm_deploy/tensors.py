"""Every tensor that crosses a border between programs, named once.

ONNX inputs, the TensorRT profile, config.pbtxt, the ensemble maps and the validators read these; nothing is retyped.
Named axes are strings (`tiles`, `rows`); a number is a fixed size. Names and types of the decoder's tensors are those
of the TensorRT-LLM C++ backend (its `tensorrt_llm/config.pbtxt`, contract C.3).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

Axis = int | str

_TRITON_TYPES = {
    "uint8": "TYPE_UINT8",
    "bool": "TYPE_BOOL",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "uint64": "TYPE_UINT64",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "float32": "TYPE_FP32",
    "string": "TYPE_STRING",
}


@dataclass(frozen=True)
class TensorSpec:
    """Name, element type and axes of one border tensor."""

    name: str
    dtype: str
    axes: tuple[Axis, ...]
    optional: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in _TRITON_TYPES:
            raise ValueError(f"{self.name}: no element type {self.dtype!r}; known: {', '.join(_TRITON_TYPES)}")

    @property
    def triton_type(self) -> str:
        """The `data_type` of config.pbtxt, as `TYPE_UINT8`."""
        return _TRITON_TYPES[self.dtype]

    @property
    def triton_dims(self) -> list[int]:
        """The `dims` of config.pbtxt; a named axis is -1."""
        return [axis if isinstance(axis, int) else -1 for axis in self.axes]

    def with_axes(self, **sizes: int) -> TensorSpec:
        """The same tensor with some named axes bound to sizes."""
        return replace(self, axes=tuple(sizes.get(axis, axis) if isinstance(axis, str) else axis for axis in self.axes))

    def required(self) -> TensorSpec:
        """The same tensor where it must be given."""
        return replace(self, optional=False)

    def of_one_request(self) -> TensorSpec:
        """The same tensor, required, with the batch axis its axes leave out: of size 1."""
        return replace(self, axes=(1, *self.axes), optional=False)


def _optional(name: str, dtype: str, *axes: Axis) -> TensorSpec:
    return TensorSpec(name, dtype, axes or (1,), optional=True)


# vision: the ONNX graph, the TensorRT engine and the Triton model share these
TILES = TensorSpec("tiles", "uint8", ("tiles", "height", "width", 3))
EMBEDDINGS = TensorSpec("embeddings", "float32", ("tiles", "tokens", "hidden"))

# what a client sends to the ensemble
TEXT_INPUT = TensorSpec("text_input", "string", (1,))
IMAGE = _optional("image", "string", "images")
MAX_TOKENS = _optional("max_tokens", "int32")
TEMPERATURE = _optional("temperature", "float32")
TOP_K = _optional("top_k", "int32")
TOP_P = _optional("top_p", "float32")
REPETITION_PENALTY = _optional("repetition_penalty", "float32")
PRESENCE_PENALTY = _optional("presence_penalty", "float32")
FREQUENCY_PENALTY = _optional("frequency_penalty", "float32")
MIN_TOKENS = _optional("min_tokens", "int32")
SEED = _optional("seed", "uint64")
STOP_WORDS = _optional("stop_words", "string", "stop_words")
BAD_WORDS = _optional("bad_words", "string", "bad_words")
STREAM = _optional("stream", "bool")
REQUEST_INPUTS = (
    TEXT_INPUT,
    IMAGE,
    MAX_TOKENS,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    REPETITION_PENALTY,
    PRESENCE_PENALTY,
    FREQUENCY_PENALTY,
    MIN_TOKENS,
    SEED,
    STOP_WORDS,
    BAD_WORDS,
    STREAM,
)

# what a client gets per streamed piece; tokens are counted piece by piece, as TensorRT-LLM's backend counts them
TEXT_OUTPUT = TensorSpec("text_output", "string", (1,))
FINISH_REASON = TensorSpec("finish_reason", "string", (1,))
INPUT_TOKEN_COUNT = TensorSpec("num_input_tokens", "int32", (1,))
OUTPUT_TOKEN_COUNT = TensorSpec("num_output_tokens", "int32", (1,))
RESPONSE_OUTPUTS = (TEXT_OUTPUT, FINISH_REASON, INPUT_TOKEN_COUNT, OUTPUT_TOKEN_COUNT)

# the decoder: axes leave out the batch dimension, as the C++ backend's config does
INPUT_IDS = _optional("input_ids", "int32", "input_tokens")
INPUT_LENGTHS = TensorSpec("input_lengths", "int32", (1,))
REQUEST_OUTPUT_LEN = TensorSpec("request_output_len", "int32", (1,))
END_ID = _optional("end_id", "int32")
PAD_ID = _optional("pad_id", "int32")
STOP_WORDS_LIST = _optional("stop_words_list", "int32", 2, "stop_tokens")
BAD_WORDS_LIST = _optional("bad_words_list", "int32", 2, "bad_tokens")
STREAMING = _optional("streaming", "bool")
STOP = _optional("stop", "bool")
EXCLUDE_INPUT_IN_OUTPUT = _optional("exclude_input_in_output", "bool")
RETURN_INPUT_TOKEN_COUNT = _optional("return_num_input_tokens", "bool")
RETURN_OUTPUT_TOKEN_COUNT = _optional("return_num_output_tokens", "bool")
DECODER_TEMPERATURE = _optional("temperature", "float32")
RUNTIME_TOP_K = _optional("runtime_top_k", "int32")
RUNTIME_TOP_P = _optional("runtime_top_p", "float32")
DECODER_SEED = _optional("seed", "uint64")
DECODER_REPETITION_PENALTY = _optional("repetition_penalty", "float32")
DECODER_PRESENCE_PENALTY = _optional("presence_penalty", "float32")
DECODER_FREQUENCY_PENALTY = _optional("frequency_penalty", "float32")
DECODER_MIN_TOKENS = _optional("min_tokens", "int32")
PROMPT_EMBEDDING_TABLE = _optional("prompt_embedding_table", "bfloat16", "rows", "hidden")
PROMPT_VOCAB_SIZE = _optional("prompt_vocab_size", "int32")
PROMPT_TABLE_EXTRA_IDS = _optional("prompt_table_extra_ids", "uint64", "input_tokens")
OUTPUT_IDS = TensorSpec("output_ids", "int32", ("beams", "output_tokens"))
SEQUENCE_LENGTH = TensorSpec("sequence_length", "int32", ("beams",))

# what the model that makes text of tokens takes and makes besides TensorRT-LLM's tensors. `request_key` is the server's
# own name of a request: what a client calls it is nobody's key.
STOP_TEXTS = _optional("stop_texts", "string", "stop_texts")
REQUEST_KEY = TensorSpec("request_key", "uint64", (1,))
TEXT_OUTPUTS = (TEXT_OUTPUT, FINISH_REASON, REQUEST_KEY)

# the rest of the C++ backend's interface (contract C.3); TensorRT-LLM's names, element types and dims
DECODER_INPUTS = (
    INPUT_IDS,
    INPUT_LENGTHS,
    REQUEST_OUTPUT_LEN,
    _optional("encoder_input_features", "float16", "frames", "features"),
    _optional("encoder_output_lengths", "int32"),
    _optional("draft_input_ids", "int32", "draft_tokens"),
    _optional("decoder_input_ids", "int32", "decoder_tokens"),
    _optional("decoder_input_lengths", "int32"),
    _optional("draft_logits", "float32", "draft_tokens", "vocabulary"),
    _optional("draft_acceptance_threshold", "float32"),
    _optional("num_return_sequences", "int32"),
    END_ID,
    PAD_ID,
    STOP_WORDS_LIST,
    BAD_WORDS_LIST,
    _optional("embedding_bias", "float32", "vocabulary"),
    EXCLUDE_INPUT_IN_OUTPUT,
    STOP,
    STREAMING,
    _optional("beam_width", "int32"),
    DECODER_TEMPERATURE,
    RUNTIME_TOP_K,
    RUNTIME_TOP_P,
    _optional("runtime_top_p_min", "float32"),
    _optional("runtime_top_p_decay", "float32"),
    _optional("runtime_top_p_reset_ids", "int32"),
    _optional("len_penalty", "float32"),
    _optional("early_stopping", "bool"),
    DECODER_REPETITION_PENALTY,
    DECODER_MIN_TOKENS,
    _optional("beam_search_diversity_rate", "float32"),
    DECODER_PRESENCE_PENALTY,
    DECODER_FREQUENCY_PENALTY,
    DECODER_SEED,
    _optional("return_log_probs", "bool"),
    _optional("return_context_logits", "bool"),
    _optional("return_generation_logits", "bool"),
    _optional("return_perf_metrics", "bool"),
    RETURN_INPUT_TOKEN_COUNT,
    RETURN_OUTPUT_TOKEN_COUNT,
    PROMPT_EMBEDDING_TABLE,
    PROMPT_TABLE_EXTRA_IDS,
    PROMPT_VOCAB_SIZE,
    _optional("cross_attention_mask", "bool", "decoder_tokens", "encoder_tokens"),
    _optional("mrope_rotary_cos_sin", "float32", "rotations"),
    _optional("mrope_position_deltas", "int64"),
    _optional("skip_cross_attn_blocks", "bool"),
    _optional("lora_task_id", "uint64"),
    _optional("lora_weights", "float16", "modules", "lora_parameters"),
    _optional("lora_config", "int32", "modules", 3),
    _optional("context_phase_params", "uint8", "size_bytes"),
    _optional("retention_token_range_starts", "int32", "ranges"),
    _optional("retention_token_range_ends", "int32", "ranges"),
    _optional("retention_token_range_priorities", "int32", "ranges"),
    _optional("retention_token_range_durations_ms", "int32", "ranges"),
    _optional("retention_decode_priority", "int32"),
    _optional("retention_decode_duration_ms", "int32"),
    _optional("guided_decoding_guide_type", "string"),
    _optional("guided_decoding_guide", "string"),
    _optional("lookahead_window_size", "int32"),
    _optional("lookahead_ngram_size", "int32"),
    _optional("lookahead_verification_set_size", "int32"),
)
DECODER_OUTPUTS = (
    OUTPUT_IDS,
    SEQUENCE_LENGTH,
    TensorSpec("cum_log_probs", "float32", ("beams",)),
    TensorSpec("output_log_probs", "float32", ("beams", "output_tokens")),
    TensorSpec("context_logits", "float32", ("input_tokens", "vocabulary")),
    TensorSpec("generation_logits", "float32", ("beams", "output_tokens", "vocabulary")),
    TensorSpec("batch_index", "int32", (1,)),
    TensorSpec("sequence_index", "int32", (1,)),
    TensorSpec("context_phase_params", "uint8", ("size_bytes",)),
    TensorSpec("kv_cache_alloc_new_blocks", "int32", (1,)),
    TensorSpec("kv_cache_reused_blocks", "int32", (1,)),
    TensorSpec("kv_cache_alloc_total_blocks", "int32", (1,)),
    TensorSpec("arrival_time_ns", "int64", (1,)),
    TensorSpec("first_scheduled_time_ns", "int64", (1,)),
    TensorSpec("first_token_time_ns", "int64", (1,)),
    TensorSpec("last_token_time_ns", "int64", (1,)),
    TensorSpec("acceptance_rate", "float32", (1,)),
    TensorSpec("total_accepted_draft_tokens", "int32", (1,)),
    TensorSpec("total_draft_tokens", "int32", (1,)),
    INPUT_TOKEN_COUNT,
    OUTPUT_TOKEN_COUNT,
)

# what preprocessing makes for the decoder, one request at a time: the decoder's batch axis is there, of size 1
PREPARED_FOR_DECODER = tuple(
    spec.of_one_request()
    for spec in (
        INPUT_IDS,
        INPUT_LENGTHS,
        REQUEST_OUTPUT_LEN,
        END_ID,
        PAD_ID,
        STOP_WORDS_LIST,
        BAD_WORDS_LIST,
        STREAMING,
        EXCLUDE_INPUT_IN_OUTPUT,
        RETURN_INPUT_TOKEN_COUNT,
        RETURN_OUTPUT_TOKEN_COUNT,
        DECODER_TEMPERATURE,
        RUNTIME_TOP_K,
        RUNTIME_TOP_P,
        DECODER_REPETITION_PENALTY,
        DECODER_PRESENCE_PENALTY,
        DECODER_FREQUENCY_PENALTY,
        DECODER_MIN_TOKENS,
        DECODER_SEED,
        PROMPT_TABLE_EXTRA_IDS,
        STOP_TEXTS,
    )
)
# what the vision encoder makes for the decoder
PROMPT_TABLE = tuple(spec.of_one_request() for spec in (PROMPT_EMBEDDING_TABLE, PROMPT_VOCAB_SIZE))
# what postprocessing takes: the first four in the order of RESPONSE_OUTPUTS
MADE_OF_TOKENS = tuple(
    spec.of_one_request() for spec in (TEXT_OUTPUT, FINISH_REASON, INPUT_TOKEN_COUNT, OUTPUT_TOKEN_COUNT, REQUEST_KEY)
)
