"""What is asked: a question, images, and how the answer is generated; as the ensemble's input tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvlm_deploy import tensors
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.tensors import TensorSpec

# an encoded file, or where it lies
Image = bytes | Path


@dataclass(frozen=True)
class Generation:
    """How an answer is generated; None leaves the choice to the server (greedy, the profile's number of tokens)."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop_words: tuple[str, ...] = ()


def input_tensors(
    question: str, images: Sequence[Image], generation: Generation
) -> Iterator[tuple[TensorSpec, Sequence[Any]]]:
    """What is sent: the question always, the rest where it was given. NvlmError for an image that cannot be read."""
    yield tensors.TEXT_INPUT, [_encoded(question)]
    yield tensors.STREAM, [True]
    if images:
        yield tensors.IMAGE, [image_bytes(image) for image in images]
    if generation.stop_words:
        yield tensors.STOP_WORDS, [_encoded(word) for word in generation.stop_words]
    numbers = (
        (tensors.MAX_TOKENS, generation.max_tokens),
        (tensors.TEMPERATURE, generation.temperature),
        (tensors.TOP_K, generation.top_k),
        (tensors.TOP_P, generation.top_p),
        (tensors.REPETITION_PENALTY, generation.repetition_penalty),
        (tensors.SEED, generation.seed),
    )
    for spec, number in numbers:
        if number is not None:
            yield spec, [number]


def _encoded(text: str) -> bytes:
    """UTF-8. A shell may hand on bytes that are no text; Python then holds them as lone surrogates."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise NvlmError(f"{text!a} is not valid UTF-8") from None


def image_bytes(image: Image) -> bytes:
    """The encoded file as it is; NvlmError when there is no such file or it cannot be read."""
    if isinstance(image, bytes):
        return image
    if not image.is_file():
        state = "is a folder" if image.is_dir() else "does not exist"
        raise NvlmError(f"image {image} {state}", hint="give the path of a JPEG, PNG or WebP file")
    try:
        return image.read_bytes()
    except OSError as problem:
        raise NvlmError(f"image {image} cannot be read: {problem.strerror}") from problem
