"""Triton model `preprocessing`: a client's question and images become tiles, token ids and sampling inputs."""

from __future__ import annotations

from typing import Any, cast

from nvlm_deploy import tensors
from nvlm_deploy.image_file.reading import ImageReading
from nvlm_deploy.model.prompt import PromptBuilder, Wrapper
from nvlm_deploy.serving import backend
from nvlm_deploy.serving.request import Ask, Limits, RequestPreparer, Sampling
from nvlm_deploy.serving.settings import TOKENIZER_FILE, ServingSettings


class TritonPythonModel:
    """What Triton calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the tokenizer and the model's facts beside `model.py`."""
        backend.set_up_logging()
        settings = ServingSettings(args)
        spec = settings.spec()
        wrapper = cast(Wrapper, settings.text("prompt_wrapper"))  # PromptBuilder checks it
        prompts = PromptBuilder(settings.folder / TOKENIZER_FILE, spec, wrapper=wrapper)
        limits = Limits(
            max_seq_len=settings.integer("max_seq_len"),
            max_images=settings.integer("max_images"),
            default_max_tokens=settings.integer("default_max_tokens"),
            images=ImageReading.from_parameters(settings.text, settings.integer),
        )
        self.preparer = RequestPreparer(
            prompts, spec, limits, vision_digest=settings.text("vision_digest"), threads=settings.integer("threads")
        )
        self.preparer.warm_up()

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response per request; a failing one fails alone."""
        return [self._response(request) for request in requests]

    def finalize(self) -> None:
        """Triton unloads the model."""
        self.preparer.close()

    def _response(self, request: Any) -> Any:
        try:
            return backend.numpy_response(self.preparer.prepared(ask_from_request(request)))
        except Exception as problem:
            return backend.error_response(problem)


def ask_from_request(request: Any) -> Ask:
    """Read the ensemble's inputs."""
    (text,) = backend.texts(request, tensors.TEXT_INPUT)
    return Ask(
        text=text,
        images=backend.texts(request, tensors.IMAGE),
        max_tokens=backend.scalar(request, tensors.MAX_TOKENS),
        sampling=Sampling(
            temperature=backend.scalar(request, tensors.TEMPERATURE),
            top_k=backend.scalar(request, tensors.TOP_K),
            top_p=backend.scalar(request, tensors.TOP_P),
            repetition_penalty=backend.scalar(request, tensors.REPETITION_PENALTY),
            seed=backend.scalar(request, tensors.SEED),
        ),
        stop_words=backend.texts(request, tensors.STOP_WORDS),
        stream=bool(backend.scalar(request, tensors.STREAM)),
    )
