"""The border to Triton's python backend: reading request tensors, making responses, telling whose fault an error is."""

from __future__ import annotations

import logging
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvlm_deploy.errors import MachineError, NvlmError
from nvlm_deploy.serving.word_list import Word, unpacked_words
from nvlm_deploy.tensors import FINISH_REASON, REQUEST_KEY, TEXT_OUTPUT, TensorSpec

logger = logging.getLogger(__name__)

# what Triton puts before the text of a step's error
_ENSEMBLE = re.compile(r"^in ensemble '[^']*', ")


def backend_module() -> Any:
    """`triton_python_backend_utils`, which exists only inside Triton's stub process."""
    import triton_python_backend_utils  # type: ignore[import-not-found, unused-ignore]

    return triton_python_backend_utils


class TritonLogHandler(logging.Handler):
    """Sends records of Python's logging to the server's own log."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record at its level."""
        log = backend_module().Logger
        write = log.log_error if record.levelno >= logging.ERROR else log.log_warn
        (write if record.levelno >= logging.WARNING else log.log_info)(self.format(record))


def set_up_logging() -> None:
    """Route this process's logging to the server's log; once per stub, from `initialize`."""
    package = logging.getLogger("nvlm_deploy")
    package.addHandler(TritonLogHandler())
    package.setLevel(logging.INFO)


def array(request: Any, spec: TensorSpec) -> NDArray[Any] | None:
    """The request's tensor as numpy, None when it was left out."""
    tensor = backend_module().get_input_tensor_by_name(request, spec.name)
    return None if tensor is None else np.asarray(tensor.as_numpy())


def words(request: Any, spec: TensorSpec) -> tuple[Word, ...]:
    """Return the words of a word list of TensorRT-LLM, nothing when it was left out."""
    packed = array(request, spec)
    return () if packed is None else unpacked_words(packed.reshape(packed.shape[-2:]), name=spec.name)


def required_array(request: Any, spec: TensorSpec) -> NDArray[Any]:
    """Return the request's tensor as numpy; NvlmError when it was left out."""
    values = array(request, spec)
    if values is None:
        raise NvlmError(f"input {spec.name} is missing")
    return values


def scalar(request: Any, spec: TensorSpec) -> Any:
    """Return the only value of a tensor, None when it was left out or is empty; NvlmError for several values."""
    values = array(request, spec)
    if values is None or values.size == 0:
        return None
    if values.size != 1:
        raise NvlmError(f"{spec.name} holds {values.size} values, expected one")
    return values.reshape(-1).tolist()[0]


def texts(request: Any, spec: TensorSpec) -> tuple[bytes, ...]:
    """The elements of a string tensor, nothing when it was left out."""
    values = array(request, spec)
    return () if values is None else tuple(bytes(value) for value in values.reshape(-1).tolist())


def wanted_outputs(request: Any) -> frozenset[str]:
    """Return the names of the outputs that are asked for."""
    return frozenset(request.requested_output_names())


def numpy_response(arrays: dict[str, NDArray[Any]], wanted: frozenset[str] | None = None) -> Any:
    """Return a response of numpy tensors, of the `wanted` ones alone where they are given.

    A response sender drops what is not wanted too, but without Python's lock (ResponseSender::Send, 24.10 to 26.07):
    now and then that damages the memory of numpy, and the process dies.
    """
    utils = backend_module()
    kept = {name: values for name, values in arrays.items() if wanted is None or name in wanted}
    return utils.InferenceResponse([utils.Tensor(name, values) for name, values in kept.items()])


def cancelled_response() -> Any:
    """The response to a client that does not wait for it any more."""
    utils = backend_module()
    return utils.InferenceResponse(
        error=utils.TritonError("CANCELLED: the client went away", utils.TritonError.CANCELLED)
    )


class ModelError(Exception):
    """A fault of a model that another model called; it is in the server's log already."""


def error_of_model(text: str) -> Exception:
    """Return the error that the text of another model's error response stands for.

    Triton hands on the text alone. That of our models begins with the status' name, see `error_response`.
    """
    text = _ENSEMBLE.sub("", text)
    name, _, rest = text.partition(": ")
    message, _, hint = rest.partition("\n  hint: ")
    if name == "INVALID_ARGUMENT":
        return NvlmError(message, hint=hint or None)
    if name == "UNAVAILABLE" or "is not healthy" in text:
        return MachineError(message or text, hint=hint or None)
    return ModelError(rest if name == "INTERNAL" else text)


def text_outputs(text: str, finish_reason: str, key: int) -> dict[str, NDArray[Any]]:
    """Return what a model that makes text adds to the counts: text, why it ended, the server's key of the request."""
    return {
        TEXT_OUTPUT.name: np.array([[text.encode()]], dtype=np.object_),
        FINISH_REASON.name: np.array([[finish_reason.encode()]], dtype=np.object_),
        REQUEST_KEY.name: np.array([[key]], dtype=np.uint64),
    }


def send_last(sender: Any, response: Any) -> None:
    """Send the final response of a request."""
    sender.send(response, flags=backend_module().TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def error_response(problem: Exception) -> Any:
    """The response that fails this one request and no other.

    A NvlmError is the request's fault, a MachineError is a lack that passes; anything else is our bug, with a traceback
    in the server's log. The text begins with the status' name: on a gRPC stream Triton sends the text alone, and the
    header that asks for statuses (`triton_grpc_error`) lets tritonserver 2.51 die of signal 11.
    """
    is_known = isinstance(problem, NvlmError | ModelError)
    if not is_known:
        logger.error("a request failed by a fault of the server", exc_info=problem)
    name, code = _status(problem)
    text = str(problem) if is_known else f"{type(problem).__name__}: {problem}"
    utils = backend_module()
    return utils.InferenceResponse(error=utils.TritonError(f"{name}: {text}", code))


def _status(problem: Exception) -> tuple[str, Any]:
    error = backend_module().TritonError
    if isinstance(problem, MachineError):
        return "UNAVAILABLE", error.UNAVAILABLE
    if isinstance(problem, NvlmError):
        return "INVALID_ARGUMENT", error.INVALID_ARG
    return "INTERNAL", error.INTERNAL
