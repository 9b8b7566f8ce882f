"""KServe's gRPC protocol as Triton speaks it: the only file that knows the client library's messages."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from nvlm_deploy.client.status import error_from_text
from nvlm_deploy.errors import MachineError, NvlmError
from nvlm_deploy.machine.address import Route
from nvlm_deploy.tensors import TensorSpec

ENSEMBLE = "nvlm"
# Protocol buffers hold less than 2 GiB; names and shapes need a few hundred bytes.
MOST_REQUEST_BYTES = 2**31 - 2**16


def service_on(channel: Any) -> Any:
    """Triton's service on a channel of either kind."""
    from tritonclient.grpc import service_pb2_grpc

    return service_pb2_grpc.GRPCInferenceServiceStub(channel)


def readiness_request() -> Any:
    """The question whether the ensemble is ready; its answer is a message with `ready`."""
    from tritonclient.grpc import service_pb2

    return service_pb2.ModelReadyRequest(name=ENSEMBLE)


def infer_request(inputs: Iterable[tuple[TensorSpec, Sequence[Any]]]) -> Any:
    """The `ModelInferRequest` for one streamed answer, with an id of its own, which the server's log shows.

    Raises NvlmError for more bytes than a message holds.
    """
    from tritonclient.grpc import service_pb2

    request = service_pb2.ModelInferRequest(model_name=ENSEMBLE, id=str(uuid.uuid4()))
    size_bytes = 0
    for spec, values in inputs:
        raw = _raw(spec, values)
        size_bytes += len(raw)
        if size_bytes > MOST_REQUEST_BYTES:
            raise NvlmError(f"the request has {size_bytes:,} bytes, at most {MOST_REQUEST_BYTES:,} can be sent")
        request.inputs.add(name=spec.name, datatype=_datatype(spec), shape=[len(values)])
        request.raw_input_contents.append(raw)
    # Without it the server says nothing after the last piece, and its end could not be told from a broken stream.
    request.parameters["triton_enable_empty_final_response"].bool_param = True
    return request


def is_final(response: Any) -> bool:
    """Whether this is the last response of its request."""
    return bool(response.parameters["triton_final_response"].bool_param)


def output_values(route: Route, response: Any, expected: Sequence[TensorSpec]) -> dict[str, Any] | None:
    """The first value of each expected output, text or a number; None for the response that only says the end.

    Raises MachineError when one is missing or of another kind: a model of that name, but not ours.
    """
    from tritonclient.grpc import InferResult

    if not response.outputs:
        return None
    result = InferResult(response)
    try:
        return {spec.name: _value(spec, result.as_numpy(spec.name)) for spec in expected}
    except (AttributeError, IndexError, TypeError, ValueError):
        found = ", ".join(output.name for output in response.outputs)
        raise MachineError(
            f"the model {ENSEMBLE} of the server at {route} answers with {found}; "
            f"expected {', '.join(spec.name for spec in expected)}",
            hint="serve a repository that this version of nvlm built",
        ) from None


def checked(route: Route, message: Any) -> Any:
    """The `ModelInferResponse` in one message of the stream; raises the error that a server may put in its place.

    Such an error is a text without a status code. The header `triton_grpc_error`, which asks for codes, is not sent: it
    makes tritonserver 2.51 die of signal 11 as soon as some request fails.
    """
    if message.error_message:
        raise error_from_text(route, message.error_message)
    return message.infer_response


def _value(spec: TensorSpec, array: Any) -> str | int:
    first = array.reshape(-1).tolist()[0]
    return first.decode(errors="replace") if spec.dtype == "string" else int(first)


def _datatype(spec: TensorSpec) -> str:
    return "BYTES" if spec.dtype == "string" else spec.triton_type.removeprefix("TYPE_")


def _raw(spec: TensorSpec, values: Sequence[Any]) -> bytes:
    """Numbers little-endian; each string behind its length in four bytes."""
    if spec.dtype == "string":
        return b"".join(part for value in values for part in (len(value).to_bytes(4, "little"), value))
    if np.dtype(spec.dtype).kind in "iu":
        _require_range(spec, values)
    return np.array(values, dtype=spec.dtype).tobytes()


def _require_range(spec: TensorSpec, values: Sequence[int]) -> None:
    """numpy 1.26 wraps a number that is too large around with a mere warning, numpy 2 raises an error of its own."""
    limits = np.iinfo(spec.dtype)
    for value in values:
        if not limits.min <= value <= limits.max:
            raise NvlmError(f"{spec.name} is {value}, expected {limits.min} to {limits.max}")
