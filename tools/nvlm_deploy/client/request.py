"""What is asked: a question, images, and how the answer is generated; as the ensemble's input tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from nvlm_deploy import tensors
from nvlm_deploy.client.generation import Generation
from nvlm_deploy.client.images import Image, encoded_images
from nvlm_deploy.client.values import shown, text_bytes
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.tensors import TensorSpec


def input_tensors(
    question: str, images: Image | Sequence[Image] = (), generation: Generation | None = None
) -> Iterator[tuple[TensorSpec, Sequence[Any]]]:
    """What is sent: the question always, the rest where it was given. NvlmError for what cannot be sent."""
    if not isinstance(generation, Generation | None):
        raise NvlmError(f"generation is {shown(generation)}, expected a Generation")
    yield tensors.TEXT_INPUT, [text_bytes("the question", question)]
    yield tensors.STREAM, [True]
    if encoded := encoded_images(images):
        yield tensors.IMAGE, encoded
    yield from (generation or Generation()).tensors()
