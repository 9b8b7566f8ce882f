"""Triton model `postprocessing`: the decoder's ids become text, one response at a time.

It takes nothing but the decoder's outputs: in a decoupled ensemble a step sees only the tensors of its own iteration,
and what preprocessing made belongs to the first. And it is where a client's going away is noticed: Triton hands an
ensemble's cancellation on to the steps it starts afterwards, not to the decoder that is running.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvlm_deploy.serving import backend
from nvlm_deploy.serving.detokenizer import Detokenizer, TokenBytes
from nvlm_deploy.serving.settings import TOKENIZER_FILE, ServingSettings
from nvlm_deploy.tensors import (
    FINISH_REASON,
    INPUT_LENGTHS,
    INPUT_TOKEN_COUNT,
    OUTPUT_IDS,
    OUTPUT_TOKEN_COUNT,
    REQUEST_OUTPUT_LEN,
    SEQUENCE_LENGTH,
    STOP,
    TEXT_OUTPUT,
)

DECODER = "tensorrt_llm"
RUNNING, STOPPED = b"", b"stop"


class TritonPythonModel:
    """What Triton calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the tokenizer beside `model.py`."""
        backend.set_up_logging()
        settings = ServingSettings(args)
        self.end_id = settings.integer("end_id")
        self.detokenizer = Detokenizer(TokenBytes(settings.folder / TOKENIZER_FILE))

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response per request; a failing one fails alone."""
        return [self._response(request) for request in requests]

    def _response(self, request: Any) -> Any:
        try:
            if request.is_cancelled():
                stop_decoder(str(request.request_id()))
                return backend.cancelled_response()
            return backend.numpy_response(self._outputs(request))
        except Exception as problem:
            return backend.error_response(problem)

    def _outputs(self, request: Any) -> dict[str, NDArray[Any]]:
        ids = backend.array(request, OUTPUT_IDS)
        tokens: list[int] = [] if ids is None else ids.reshape(-1).tolist()
        inputs = int(backend.scalar(request, INPUT_TOKEN_COUNT))
        outputs = int(backend.scalar(request, OUTPUT_TOKEN_COUNT))
        is_last = has_stopped(tokens, self.end_id)
        text = self.detokenizer.piece(str(request.request_id()), tokens, is_last=is_last)
        return {
            TEXT_OUTPUT.name: np.array([text], dtype=np.object_),
            FINISH_REASON.name: np.array([STOPPED if is_last else RUNNING], dtype=np.object_),
            INPUT_TOKEN_COUNT.name: np.array([inputs], dtype=np.int32),
            OUTPUT_TOKEN_COUNT.name: np.array([outputs], dtype=np.int32),
        }


def stop_decoder(request_id: str) -> None:
    """Send the decoder the `stop` of contract C.3: it ends the generation of this id. Without an id none is known."""
    if not request_id:
        return
    utils = backend.backend_module()
    inputs = {INPUT_LENGTHS: np.array([[1]]), REQUEST_OUTPUT_LEN: np.array([[1]]), STOP: np.array([[True]])}
    request = utils.InferenceRequest(
        model_name=DECODER,
        request_id=request_id,
        requested_output_names=[SEQUENCE_LENGTH.name],
        inputs=[utils.Tensor(spec.name, values.astype(spec.dtype)) for spec, values in inputs.items()],
    )
    for _ in request.exec(decoupled=True):
        pass


def has_stopped(tokens: list[int], end_id: int) -> bool:
    """Whether a response says that the model itself ended.

    The reference decoder sends the end id last; TensorRT-LLM does not count it as output and sends an empty response.
    """
    return not tokens or tokens[-1] == end_id
