"""A client's request is checked and becomes the tensors of the first ensemble step. Light imports; knows no Triton."""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvlm_deploy import tensors
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.image_file.opening import AS_VIEWED
from nvlm_deploy.image_file.reading import ImageReading
from nvlm_deploy.model.image_tiler import ImageTiler
from nvlm_deploy.model.prompt import IMAGE_PLACEHOLDER, PromptBuilder
from nvlm_deploy.model.spec import ModelSpec
from nvlm_deploy.model.tiling import tiles_from_image
from nvlm_deploy.serving.word_list import Word, packed_words

# TensorRT-LLM's kernels hold no more candidates than this
MAX_TOP_K = 1024
MAX_STOP_WORDS = 64


@dataclass(frozen=True)
class Sampling:
    """What the client said about sampling; None where it said nothing."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None

    def checked(self) -> Sampling:
        """Itself. Raises NvlmError for a value that is not finite or out of its range."""
        _require(self.temperature, "temperature", 0.0, 100.0)
        _require(self.top_k, "top_k", 0, MAX_TOP_K)
        _require(self.top_p, "top_p", 0.0, 1.0)
        _require(self.repetition_penalty, "repetition_penalty", 0.01, 100.0)
        return self

    @property
    def is_greedy(self) -> bool:
        """The model's default. Temperature 0 says so; so does saying nothing of temperature, top_k and top_p."""
        if self.temperature is None:
            return self.top_k is None and self.top_p is None
        return self.temperature == 0


def _require(value: float | None, name: str, low: float, high: float) -> None:
    if value is not None and not (math.isfinite(value) and low <= value <= high):
        raise NvlmError(f"{name} is {value:g}, expected {low:g} to {high:g}")


@dataclass(frozen=True)
class Ask:
    """One question as the client sent it; images are encoded files."""

    text: bytes
    images: tuple[bytes, ...] = ()
    max_tokens: int | None = None
    sampling: Sampling = Sampling()
    stop_words: tuple[bytes, ...] = ()
    stream: bool = False


@dataclass(frozen=True)
class Limits:
    """What one request may ask for; lengths in tokens."""

    max_seq_len: int
    max_images: int
    default_max_tokens: int
    images: ImageReading = AS_VIEWED


class RequestPreparer:
    """Makes the decoder's inputs from a question."""

    def __init__(
        self, prompts: PromptBuilder, spec: ModelSpec, limits: Limits, *, vision_digest: str, threads: int = 1
    ) -> None:
        """`vision_digest` names the encoder: the same pixels through another encoder are another prefix.

        `threads` read the images of a request; they cost memory for as many decoded images.
        """
        self.prompts = prompts
        self.spec = spec
        self.limits = limits
        self.vision_digest = vision_digest
        self.tiler = ImageTiler(spec.tiling, threads=threads, reading=limits.images)

    def close(self) -> None:
        """End its threads."""
        self.tiler.close()

    def warm_up(self) -> None:
        """Load what is loaded at first use: Pillow's readers and the tokenizer's tables."""
        from PIL import Image

        Image.init()
        self.prompts.ids("warm up", [1])
        tiles_from_image(Image.new("RGB", (2, 2)), self.spec.tiling)

    def prepared(self, ask: Ask) -> dict[str, NDArray[Any]]:
        """Every output tensor of the preprocessing model, by name. Raises NvlmError for what cannot be served."""
        sampling = ask.sampling.checked()
        question = self._question(ask)
        stop_words = self._stop_words(ask.stop_words)
        tiles, counts = self.tiler.tiles(ask.images)
        ids = self.prompts.prompt_table_ids(question, counts)
        max_tokens = self._max_tokens(ask.max_tokens, len(ids))
        return {
            tensors.TILES.name: tiles,
            **_decoder_tensors(ids, max_tokens, packed_words(stop_words), stream=ask.stream),
            tensors.END_ID.name: _one(self.spec.prompt.eos_token_id, np.int32),
            tensors.PAD_ID.name: _one(self.spec.prompt.bos_token_id, np.int32),
            **_sampling_tensors(sampling),
            tensors.PROMPT_TABLE_EXTRA_IDS.name: self._extra_ids(ids, tiles),
        }

    def _question(self, ask: Ask) -> str:
        try:
            question = ask.text.decode("utf-8")
        except UnicodeDecodeError as problem:
            raise NvlmError(f"text_input is not UTF-8: {problem}") from None
        if not question.replace(IMAGE_PLACEHOLDER, "").strip():
            raise NvlmError("the question is empty", hint="put a question into text_input")
        if len(ask.images) > self.limits.max_images:
            raise NvlmError(f"{len(ask.images)} images, at most {self.limits.max_images} per request are served")
        if ask.max_tokens is not None and ask.max_tokens < 1:
            raise NvlmError(f"max_tokens is {ask.max_tokens}, expected at least 1")
        return question

    def _max_tokens(self, asked: int | None, prompt_tokens: int) -> int:
        left = self.limits.max_seq_len - prompt_tokens
        if left < 1:
            raise NvlmError(
                f"the prompt has {prompt_tokens} tokens; with the answer at most {self.limits.max_seq_len} are served",
                hint="shorten the text or send fewer images",
            )
        if asked is None:
            return min(self.limits.default_max_tokens, left)
        if asked > left:
            raise NvlmError(
                f"max_tokens is {asked}, at most {left} fit behind {prompt_tokens} prompt tokens "
                f"(max_seq_len {self.limits.max_seq_len})"
            )
        return asked

    def _stop_words(self, words: Sequence[bytes]) -> list[Word]:
        """Each word as it is tokenised alone and after a space: the two forms differ in byte-level BPE."""
        if len(words) > MAX_STOP_WORDS:
            raise NvlmError(f"{len(words)} stop words, at most {MAX_STOP_WORDS} are served")
        if any(not word for word in words):
            raise NvlmError("a stop word is empty")
        forms = [form for word in words for form in _forms(word)]
        encode = self.prompts.tokenizer.encode
        return list(dict.fromkeys(tuple(encode(form, add_special_tokens=False).ids) for form in forms))

    def _extra_ids(self, ids: Sequence[int], tiles: NDArray[np.uint8]) -> NDArray[Any]:
        """uint64 [1, tokens]: at visual positions an id of the tile's content, 0 elsewhere.

        KV blocks are shared by token ids, and all images have the same visual ids; without these two images with one
        prefix would share one cache entry (contract C.2, pain 12).
        """
        extra = np.zeros((1, len(ids)), dtype=np.uint64)
        keys = [self._tile_key(tile) for tile in tiles]
        positions = np.flatnonzero(np.array(ids) >= self.spec.decoder.vocab_size)
        extra[0, positions] = np.repeat(np.array(keys, dtype=np.uint64), self.spec.tiling.tokens_per_tile)
        return extra

    def _tile_key(self, tile: NDArray[np.uint8]) -> int:
        """A 64-bit id >= 1 of the pixels and the encoder."""
        content = hashlib.sha256(self.vision_digest.encode())
        content.update(tile.data)  # as it lies: a copy would take longer than the hash
        return int.from_bytes(content.digest()[:8], "little") or 1


def _forms(word: bytes) -> tuple[str, str]:
    text = word.decode("utf-8", errors="replace")
    return text, f" {text}"


def _one(value: float, dtype: type[np.generic]) -> NDArray[Any]:
    return np.array([[value]], dtype=dtype)


def _decoder_tensors(
    ids: Sequence[int], max_tokens: int, stop_words: NDArray[Any], *, stream: bool
) -> dict[str, NDArray[Any]]:
    return {
        tensors.INPUT_IDS.name: np.array([ids], dtype=np.int32),
        tensors.INPUT_LENGTHS.name: _one(len(ids), np.int32),
        tensors.REQUEST_OUTPUT_LEN.name: _one(max_tokens, np.int32),
        tensors.STOP_WORDS_LIST.name: stop_words[None],
        tensors.STREAMING.name: _one(stream, np.bool_),
        tensors.EXCLUDE_INPUT_IN_OUTPUT.name: _one(True, np.bool_),
        tensors.RETURN_INPUT_TOKEN_COUNT.name: _one(True, np.bool_),
        tensors.RETURN_OUTPUT_TOKEN_COUNT.name: _one(True, np.bool_),
    }


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
        tensors.DECODER_SEED.name: np.array([[seed]], dtype=np.uint64),
    }
