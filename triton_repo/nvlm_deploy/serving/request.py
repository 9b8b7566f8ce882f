"""A client's question is judged and becomes the tensors of the first ensemble step. Light imports; knows no Triton."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvlm_deploy import tensors
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.model.image_tiler import ImageTiler
from nvlm_deploy.model.prompt import IMAGE_PLACEHOLDER, PromptBuilder
from nvlm_deploy.model.spec import ModelSpec
from nvlm_deploy.serving.options import Ask, Sampling
from nvlm_deploy.serving.word_list import Word, packed_words


@dataclass(frozen=True)
class Limits:
    """What one request may ask for; lengths in tokens, sizes in bytes."""

    max_seq_len: int
    max_images: int
    default_max_tokens: int
    max_request_bytes: int


class RequestPreparer:
    """Makes the decoder's inputs from a question."""

    def __init__(
        self, prompts: PromptBuilder, tiler: ImageTiler, spec: ModelSpec, limits: Limits, *, vision_digest: str
    ) -> None:
        """`vision_digest` names the encoder: the same pixels through another encoder are another prefix."""
        self.prompts = prompts
        self.tiler = tiler
        self.vision_digest = vision_digest
        self.spec = spec
        self.limits = limits
        self.max_text_bytes = prompts.longest_token_bytes * limits.max_seq_len

    def warm_up(self) -> None:
        """Load what is loaded at first use: the tokenizer's tables and Pillow's readers."""
        self.tiler.warm_up()
        self.prompts.ids("warm up", [1])

    def require_within_limits(self, ask: Ask) -> None:
        """Raise NvlmError with the number and the limit for what is too much, judged before any work is done."""
        size, most = len(ask.text), self.max_text_bytes
        if size > most:
            raise NvlmError(
                f"the text has {size:,} bytes; at most {most:,} bytes can fit into {self.limits.max_seq_len} tokens",
                hint="shorten the text",
            )
        if len(ask.images) > self.limits.max_images:
            raise NvlmError(f"{len(ask.images)} images, at most {self.limits.max_images} per request are served")
        size, most = ask.size_bytes, self.limits.max_request_bytes
        if size > most:
            raise NvlmError(
                f"text and images have {size:,} bytes, at most {most:,} a request are served",
                hint="send fewer or smaller image files: the model never sees more than an image's tiles",
            )

    def prepared(self, ask: Ask) -> dict[str, NDArray[Any]]:
        """Return every output of the preprocessing model, by name. Raises NvlmError for what cannot be served."""
        question = self._question(ask)
        tiles, counts = self.tiler.tiles(ask.images)
        ids = self.prompts.prompt_table_ids(question, counts)
        prompt = self.spec.prompt
        return {
            tensors.TILES.name: tiles,
            tensors.INPUT_IDS.name: np.array([ids], dtype=np.int32),
            tensors.INPUT_LENGTHS.name: _one(len(ids), np.int32),
            tensors.REQUEST_OUTPUT_LEN.name: _one(self._max_tokens(ask, len(ids)), np.int32),
            tensors.END_ID.name: _one(prompt.eos_token_id, np.int32),
            tensors.PAD_ID.name: _one(prompt.pad_token_id, np.int32),
            tensors.STOP_WORDS_LIST.name: packed_words(self._further_ends())[None],
            tensors.BAD_WORDS_LIST.name: packed_words(self._bad_words(ask.bad_words))[None],
            tensors.STREAMING.name: _one(ask.stream, np.bool_),
            tensors.EXCLUDE_INPUT_IN_OUTPUT.name: _one(True, np.bool_),
            tensors.RETURN_INPUT_TOKEN_COUNT.name: _one(True, np.bool_),
            tensors.RETURN_OUTPUT_TOKEN_COUNT.name: _one(True, np.bool_),
            **_sampling_tensors(ask.sampling),
            tensors.PROMPT_TABLE_EXTRA_IDS.name: self._extra_ids(ids, tiles),
            tensors.STOP_TEXTS.name: np.array([[word.encode() for word in ask.stop_words]], dtype=np.object_),
        }

    def _question(self, ask: Ask) -> str:
        try:
            question = ask.text.decode("utf-8")
        except UnicodeDecodeError as problem:
            raise NvlmError(f"text_input is not UTF-8: {problem}") from None
        if not (question.replace(IMAGE_PLACEHOLDER, "") if ask.images else question).strip():
            raise NvlmError("the question is empty", hint="put a question into text_input")
        return question

    def _max_tokens(self, ask: Ask, prompt_tokens: int) -> int:
        left, asked = self.limits.max_seq_len - prompt_tokens, ask.max_tokens
        if left < 1:
            raise NvlmError(
                f"the prompt has {prompt_tokens} tokens; with the answer at most {self.limits.max_seq_len} are served",
                hint="shorten the text or send fewer images",
            )
        if asked is None:
            asked = min(self.limits.default_max_tokens, left)
        if asked > left:
            raise NvlmError(
                f"max_tokens is {asked}, at most {left} fit behind {prompt_tokens} prompt tokens "
                f"(max_seq_len {self.limits.max_seq_len})"
            )
        if (ask.sampling.min_tokens or 0) > asked:
            raise NvlmError(f"min_tokens is {ask.sampling.min_tokens}, expected at most max_tokens, which is {asked}")
        return asked

    def _further_ends(self) -> list[Word]:
        """Return the end ids besides the main one: the decoder takes one `end_id`, and words for the rest."""
        prompt = self.spec.prompt
        return [(token,) for token in prompt.eos_token_ids if token != prompt.eos_token_id]

    def _extra_ids(self, ids: Sequence[int], tiles: NDArray[np.uint8]) -> NDArray[Any]:
        """Return uint64 [1, tokens]: at visual positions an id of the tile's content, 0 elsewhere.

        KV blocks are shared by token ids, and all images have the same visual ids; without these two images with one
        prefix would share one cache entry (contract C.2, pain 12).
        """
        extra = np.zeros((1, len(ids)), dtype=np.uint64)
        keys = [self._tile_key(tile) for tile in tiles]
        positions = np.flatnonzero(np.array(ids) >= self.spec.decoder.vocab_size)
        extra[0, positions] = np.repeat(np.array(keys, dtype=np.uint64), self.spec.tiling.tokens_per_tile)
        return extra

    def _tile_key(self, tile: NDArray[np.uint8]) -> int:
        """Return a 64-bit id >= 1 of the pixels and the encoder."""
        content = hashlib.sha256(self.vision_digest.encode())
        content.update(tile.data)  # as it lies: a copy would take longer than the hash
        return int.from_bytes(content.digest()[:8], "little") or 1

    def _bad_words(self, words: Sequence[str]) -> list[Word]:
        """Return each word as it is tokenised alone and after a space: the two differ in byte-level BPE."""
        forms = [form for word in words for form in (word, f" {word}")]
        return list(dict.fromkeys(self.prompts.words(form) for form in forms))


def _one(value: float, dtype: type[np.generic]) -> NDArray[Any]:
    return np.array([[value]], dtype=dtype)


def _sampling_tensors(sampling: Sampling) -> dict[str, NDArray[Any]]:
    """Greedy search is runtime_top_k 1 at temperature 1; a missing seed is drawn, so that answers differ."""
    temperature, top_k, top_p = 1.0, 1, 1.0
    if not sampling.is_greedy:
        temperature = 1.0 if sampling.temperature is None else sampling.temperature
        top_k = sampling.top_k or 0
        top_p = 1.0 if sampling.top_p is None else sampling.top_p
    seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
    return {
        tensors.DECODER_TEMPERATURE.name: _one(temperature, np.float32),
        tensors.RUNTIME_TOP_K.name: _one(top_k, np.int32),
        tensors.RUNTIME_TOP_P.name: _one(top_p, np.float32),
        tensors.DECODER_REPETITION_PENALTY.name: _one(sampling.repetition_penalty or 1.0, np.float32),
        tensors.DECODER_PRESENCE_PENALTY.name: _one(sampling.presence_penalty or 0.0, np.float32),
        tensors.DECODER_FREQUENCY_PENALTY.name: _one(sampling.frequency_penalty or 0.0, np.float32),
        tensors.DECODER_MIN_TOKENS.name: _one(sampling.min_tokens or 0, np.int32),
        tensors.DECODER_SEED.name: np.array([[seed]], dtype=np.uint64),
    }
