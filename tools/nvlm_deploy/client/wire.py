"""KServe's gRPC protocol as Triton speaks it: the only file that knows the client library's messages."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from nvlm_deploy.client.status import error_from_status, error_from_text
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.tensors import TensorSpec

ENSEMBLE = "nvlm"
# Images travel in the message; gRPC's own limit is 4 MiB.
CHANNEL_OPTIONS = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))


def channel_to(url: str) -> Any:
    """A gRPC channel; connects on first use."""
    import grpc  # type: ignore[import-untyped, unused-ignore]

    return grpc.insecure_channel(url, options=CHANNEL_OPTIONS)


def async_channel_to(url: str) -> Any:
    """A gRPC channel of the running event loop."""
    import grpc  # type: ignore[import-untyped, unused-ignore]

    return grpc.aio.insecure_channel(url, options=CHANNEL_OPTIONS)


def service_on(channel: Any) -> Any:
    """Triton's service on a channel of either kind."""
    from tritonclient.grpc import service_pb2_grpc

    return service_pb2_grpc.GRPCInferenceServiceStub(channel)


@contextlib.contextmanager
def rpc_errors(url: str) -> Iterator[None]:
    """A `grpc.RpcError` becomes the error it means to the user."""
    import grpc  # type: ignore[import-untyped, unused-ignore]

    try:
        yield
    except grpc.RpcError as problem:
        raise error_from_status(url, problem.code().name, problem.details() or "no details") from None


def infer_request(inputs: Iterable[tuple[TensorSpec, Sequence[Any]]]) -> Any:
    """The `ModelInferRequest` for one streamed answer, with an id of its own.

    The id is what postprocessing keeps its detokenisation state by. Raises NvlmError for a whole number that its tensor
    cannot hold.
    """
    from tritonclient.grpc import service_pb2

    request = service_pb2.ModelInferRequest(model_name=ENSEMBLE, id=str(uuid.uuid4()))
    for spec, values in inputs:
        request.inputs.add(name=spec.name, datatype=_datatype(spec), shape=[len(values)])
        request.raw_input_contents.append(_raw(spec, values))
    # Without it the server says nothing after the last piece, and its end could not be told from a broken stream.
    request.parameters["triton_enable_empty_final_response"].bool_param = True
    return request


def is_final(response: Any) -> bool:
    """Whether this is the last response of its request."""
    return bool(response.parameters["triton_final_response"].bool_param)


def output_values(response: Any) -> dict[str, Any]:
    """The first value of each output, bytes or a number; nothing for the response that only says the end."""
    from tritonclient.grpc import InferResult

    result = InferResult(response)
    return {output.name: result.as_numpy(output.name).reshape(-1).tolist()[0] for output in response.outputs}


def checked(url: str, message: Any) -> Any:
    """The `ModelInferResponse` in one message of the stream; raises the error that a server may put in its place.

    Such an error is a text without a status code. The header `triton_grpc_error`, which asks for codes, is not sent: it
    makes tritonserver 2.51 die of signal 11 as soon as some request fails.
    """
    if message.error_message:
        raise error_from_text(url, message.error_message)
    return message.infer_response


def _datatype(spec: TensorSpec) -> str:
    return "BYTES" if spec.dtype == "string" else spec.triton_type.removeprefix("TYPE_")


def _raw(spec: TensorSpec, values: Sequence[Any]) -> bytes:
    """Numbers little-endian; each string behind its length in four bytes."""
    if spec.dtype == "string":
        return b"".join(len(value).to_bytes(4, "little") + value for value in values)
    dtype = np.dtype(spec.dtype)
    if dtype.kind in "iu":
        _require_range(spec, values, np.iinfo(dtype))
    return np.array(values, dtype=dtype).tobytes()


def _require_range(spec: TensorSpec, values: Sequence[int], limits: Any) -> None:
    """numpy 1.26 wraps a number that is too large around with a mere warning."""
    for value in values:
        if not limits.min <= value <= limits.max:
            raise NvlmError(f"{spec.name} is {value}, expected {limits.min} to {limits.max}")
