"""The border to Triton's python backend: reading request tensors, making responses, telling whose fault an error is."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvlm_deploy.errors import MachineError, NvlmError
from nvlm_deploy.tensors import TensorSpec

logger = logging.getLogger(__name__)


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


def scalar(request: Any, spec: TensorSpec) -> Any:
    """The only value of a tensor as a Python object, None when it was left out; NvlmError for any other size."""
    values = array(request, spec)
    if values is None:
        return None
    if values.size != 1:
        raise NvlmError(f"{spec.name} holds {values.size} values, expected one")
    return values.reshape(-1).tolist()[0]


def texts(request: Any, spec: TensorSpec) -> tuple[bytes, ...]:
    """The elements of a string tensor, nothing when it was left out."""
    values = array(request, spec)
    return () if values is None else tuple(bytes(value) for value in values.reshape(-1).tolist())


def numpy_response(arrays: dict[str, NDArray[Any]]) -> Any:
    """A response of numpy tensors."""
    utils = backend_module()
    return utils.InferenceResponse([utils.Tensor(name, values) for name, values in arrays.items()])


def cancelled_response() -> Any:
    """The response to a client that does not wait for it any more."""
    utils = backend_module()
    return utils.InferenceResponse(
        error=utils.TritonError("CANCELLED: the client went away", utils.TritonError.CANCELLED)
    )


def error_response(problem: Exception) -> Any:
    """The response that fails this one request and no other.

    A NvlmError is the request's fault, a MachineError is a lack that passes; anything else is our bug, with a traceback
    in the server's log. The text begins with the status' name: on a gRPC stream Triton sends the text alone, and the
    header that asks for statuses (`triton_grpc_error`) lets tritonserver 2.51 die of signal 11.
    """
    if not isinstance(problem, NvlmError):
        logger.error("a request failed by a fault of the server", exc_info=problem)
    name, code = _status(problem)
    text = str(problem) if isinstance(problem, NvlmError) else f"{type(problem).__name__}: {problem}"
    utils = backend_module()
    return utils.InferenceResponse(error=utils.TritonError(f"{name}: {text}", code))


def _status(problem: Exception) -> tuple[str, Any]:
    error = backend_module().TritonError
    if isinstance(problem, MachineError):
        return "UNAVAILABLE", error.UNAVAILABLE
    if isinstance(problem, NvlmError):
        return "INVALID_ARGUMENT", error.INVALID_ARG
    return "INTERNAL", error.INTERNAL
