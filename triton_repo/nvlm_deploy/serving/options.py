"""What a client may ask for: the options of a request, read and judged before any work is done."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nvlm_deploy import tensors
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.serving import backend

# TensorRT-LLM's kernels hold no more candidates than this
MAX_TOP_K = 1024
MAX_WORDS = 64
# longer than any sentence that an answer is known to end with
MAX_WORD_BYTES = 1024
OPTIONS = tuple(spec.name for spec in tensors.REQUEST_INPUTS)
# other servers' names for what an option of ours does
_OTHER_NAMES = {
    **dict.fromkeys(("max_new_tokens", "max_output_tokens", "request_output_len", "max_length"), "max_tokens"),
    **dict.fromkeys(("min_length", "min_new_tokens"), "min_tokens"),
    **dict.fromkeys(("random_seed",), "seed"),
    **dict.fromkeys(("stop", "stop_sequences", "stop_strings"), "stop_words"),
    **dict.fromkeys(("prompt", "text", "question", "inputs", "messages"), "text_input"),
    **dict.fromkeys(("images", "image_url", "image_bytes", "image_input", "multi_modal_data"), "image"),
    **dict.fromkeys(("streaming",), "stream"),
    **dict.fromkeys(("runtime_top_k",), "top_k"),
    **dict.fromkeys(("runtime_top_p",), "top_p"),
}
# Triton adds parameters of its own under this name
_TRITONS = "triton"


@dataclass(frozen=True)
class Sampling:
    """What the client said about sampling; None where it said nothing."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    min_tokens: int | None = None
    seed: int | None = None

    def checked(self) -> Sampling:
        """Return itself. Raises NvlmError for a value that is not finite or out of its range."""
        _require(self.temperature, "temperature", 0.0, 100.0)
        _require(self.top_k, "top_k", 0, MAX_TOP_K)
        _require(self.top_p, "top_p", 0.0, 1.0)
        _require(self.repetition_penalty, "repetition_penalty", 0.01, 100.0)
        _require(self.presence_penalty, "presence_penalty", -100.0, 100.0)
        _require(self.frequency_penalty, "frequency_penalty", -100.0, 100.0)
        return self

    @property
    def is_greedy(self) -> bool:
        """Whether the best token is always taken, which is the default.

        Temperature 0 says so; so does saying nothing of temperature, top_k and top_p.
        """
        if self.temperature is None:
            return self.top_k is None and self.top_p is None
        return self.temperature == 0


def _require(value: float | None, name: str, low: float, high: float) -> None:
    if value is not None and not (math.isfinite(value) and low <= value <= high):
        raise NvlmError(f"{name} is {value:g}, expected {low:g} to {high:g}")


@dataclass(frozen=True)
class Ask:
    """One question as the client sent it; images are files, or their base64."""

    text: bytes
    images: tuple[bytes, ...] = ()
    max_tokens: int | None = None
    sampling: Sampling = Sampling()
    stop_words: tuple[str, ...] = ()
    bad_words: tuple[str, ...] = ()
    stream: bool = False

    @property
    def size_bytes(self) -> int:
        """Bytes of text and images."""
        return len(self.text) + sum(map(len, self.images))


def ask_from_request(request: Any) -> Ask:
    """Read the inputs of `nvlm`. Raises NvlmError for an option that is unknown or out of its range."""
    refuse_unknown(parameters_of(request))
    (text,) = backend.texts(request, tensors.TEXT_INPUT) or (b"",)
    return Ask(
        text=text,
        images=_given(backend.texts(request, tensors.IMAGE)),
        max_tokens=_count(request, tensors.MAX_TOKENS, at_least=1),
        sampling=Sampling(
            temperature=backend.scalar(request, tensors.TEMPERATURE),
            top_k=backend.scalar(request, tensors.TOP_K),
            top_p=backend.scalar(request, tensors.TOP_P),
            repetition_penalty=backend.scalar(request, tensors.REPETITION_PENALTY),
            presence_penalty=backend.scalar(request, tensors.PRESENCE_PENALTY),
            frequency_penalty=backend.scalar(request, tensors.FREQUENCY_PENALTY),
            min_tokens=_count(request, tensors.MIN_TOKENS, at_least=0),
            seed=backend.scalar(request, tensors.SEED),
        ).checked(),
        stop_words=words_from(backend.texts(request, tensors.STOP_WORDS), name=tensors.STOP_WORDS.name),
        bad_words=words_from(backend.texts(request, tensors.BAD_WORDS), name=tensors.BAD_WORDS.name),
        stream=bool(backend.scalar(request, tensors.STREAM)),
    )


def parameters_of(request: Any) -> dict[str, Any]:
    """Return what came beside the tensors: over HTTP every key of the JSON body that no input is called."""
    given: dict[str, Any] = json.loads(request.parameters() or "{}")
    for name in ("priority", "timeout", "correlation_id"):
        value = getattr(request, name)() if hasattr(request, name) else 0
        if value:
            given[name] = value
    return given


def refuse_unknown(parameters: dict[str, Any]) -> None:
    """Raise NvlmError for the first parameter that is not Triton's own: none of them would be honoured."""
    for name in parameters:
        if not name.startswith(_TRITONS):
            raise NvlmError(f"option {name} is not known or not honoured here", hint=_nearest(name))


def _nearest(name: str) -> str:
    close = difflib.get_close_matches(name.lower(), OPTIONS, n=1, cutoff=0.6)
    nearest = _OTHER_NAMES.get(name.lower()) or (close[0] if close else None)
    return f"did you mean {nearest}?" if nearest else f"leave it out; there are: {', '.join(OPTIONS)}"


def words_from(values: Sequence[bytes], *, name: str) -> tuple[str, ...]:
    """Return the words, each once. Raises NvlmError for too many, too long ones and bytes that are not UTF-8."""
    words = tuple(dict.fromkeys(_given(values)))
    if len(words) > MAX_WORDS:
        raise NvlmError(f"{name} holds {len(words)} words, at most {MAX_WORDS} are served")
    for word in words:
        if len(word) > MAX_WORD_BYTES:
            raise NvlmError(f"{name} holds a word of {len(word)} bytes, at most {MAX_WORD_BYTES} are served")
    try:
        return tuple(word.decode("utf-8") for word in words)
    except UnicodeDecodeError as problem:
        raise NvlmError(f"{name} is not UTF-8: {problem}") from None


def _given(values: Sequence[bytes]) -> tuple[bytes, ...]:
    """Return the values without empty ones: `""`, `[]` and `[""]` all mean that the option was left out."""
    return tuple(value for value in values if value)


def _count(request: Any, spec: tensors.TensorSpec, *, at_least: int) -> int | None:
    value = backend.scalar(request, spec)
    if value is not None and value < at_least:
        raise NvlmError(f"{spec.name} is {value}, expected at least {at_least}")
    return None if value is None else int(value)
