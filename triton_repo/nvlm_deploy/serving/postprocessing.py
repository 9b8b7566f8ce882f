"""Triton model `postprocessing`: hands an answer's pieces on, and has the decoder stop when nobody wants them any more.

It keeps nothing from one piece to the next. Triton hands an ensemble's cancellation on to the steps it starts
afterwards, not to the decoder that is running, and every piece starts this step: so it is seen here.
"""

from __future__ import annotations

from typing import Any

from nvlm_deploy.serving import backend
from nvlm_deploy.serving.stopping import StopSender
from nvlm_deploy.tensors import MADE_OF_TOKENS, REQUEST_KEY, RESPONSE_OUTPUTS


class TritonPythonModel:
    """What Triton calls."""

    def initialize(self, _: dict[str, str]) -> None:
        """Find the decoder's process."""
        backend.set_up_logging()
        self.stopping = StopSender()

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response per request; a failing one fails alone."""
        return [self._response(request) for request in requests]

    def finalize(self) -> None:
        """Triton unloads the model."""
        self.stopping.close()

    def _response(self, request: Any) -> Any:
        try:
            if request.is_cancelled():
                self.stopping.send(int(backend.scalar(request, REQUEST_KEY)))
                return backend.cancelled_response()
            pairs = zip(RESPONSE_OUTPUTS, MADE_OF_TOKENS, strict=False)
            arrays = {outer.name: backend.required_array(request, inner).reshape(1) for outer, inner in pairs}
            return backend.numpy_response(arrays)
        except Exception as problem:
            return backend.error_response(problem)
