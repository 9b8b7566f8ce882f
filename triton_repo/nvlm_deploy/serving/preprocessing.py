"""Triton model `preprocessing`: a client's question and images become tiles, token ids and sampling inputs."""

from __future__ import annotations

import functools
from typing import Any, cast

from nvlm_deploy.image_file.reading import ImageReading
from nvlm_deploy.model.image_tiler import ImageTiler
from nvlm_deploy.model.prompt import PromptBuilder, Wrapper
from nvlm_deploy.serving import backend
from nvlm_deploy.serving.lanes import Lanes
from nvlm_deploy.serving.options import Ask, ask_from_request
from nvlm_deploy.serving.request import Limits, RequestPreparer
from nvlm_deploy.serving.settings import TOKENIZER_FILE, ServingSettings


class TritonPythonModel:
    """What Triton calls; decoupled, so that a request that waits for its turn stops nobody."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the tokenizer and the model's facts beside `model.py`."""
        backend.set_up_logging()
        settings = ServingSettings(args)
        spec = settings.spec()
        wrapper = cast(Wrapper, settings.text("prompt_wrapper"))  # PromptBuilder checks it
        limits = Limits(
            max_seq_len=settings.integer("max_seq_len"),
            max_images=settings.integer("max_images"),
            default_max_tokens=settings.integer("default_max_tokens"),
            max_request_bytes=settings.integer("max_request_bytes"),
        )
        threads = settings.integer("threads")
        reading = ImageReading.from_parameters(settings.text, settings.integer)
        self.tiler = ImageTiler(spec.tiling, threads=threads, reading=reading)
        prompts = PromptBuilder(settings.folder / TOKENIZER_FILE, spec, wrapper=wrapper)
        self.preparer = RequestPreparer(prompts, self.tiler, spec, limits, vision_digest=settings.text("vision_digest"))
        self.preparer.warm_up()
        self.lanes = Lanes(
            threads=threads,
            max_jobs=settings.integer("max_waiting_requests"),
            max_bytes=settings.integer("max_waiting_bytes"),
        )

    def execute(self, requests: list[Any]) -> None:
        """Judge and queue the requests; returns at once."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                ask = ask_from_request(request)
                self.preparer.require_within_limits(ask)
                job = functools.partial(self._prepare, ask, sender)
                self.lanes.submit(job, has_pictures=bool(ask.images), size_bytes=ask.size_bytes)
            except Exception as problem:
                backend.send_last(sender, backend.error_response(problem))

    def finalize(self) -> None:
        """Triton unloads the model."""
        self.lanes.close()
        self.tiler.close()

    def _prepare(self, ask: Ask, sender: Any) -> None:
        try:
            response = backend.numpy_response(self.preparer.prepared(ask))
        except Exception as problem:
            response = backend.error_response(problem)
        backend.send_last(sender, response)
