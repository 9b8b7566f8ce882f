"""Triton's service on real gRPC, with answers that tests choose; and a relay to it whose cable can be cut."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor


def piece(text: str, *, tokens: int = 1, reason: str = "", final: bool = False) -> Any:
    """One response of the ensemble."""
    message = service_pb2.ModelInferResponse(model_name="nvlm")
    for name, value in (("text_output", text), ("finish_reason", reason)):
        message.outputs.add(name=name, datatype="BYTES", shape=[1])
        message.raw_output_contents.append(serialize_byte_tensor(np.array([value.encode()], dtype=np.object_)).item())
    for name, number in (("num_input_tokens", 24), ("num_output_tokens", tokens)):
        message.outputs.add(name=name, datatype="INT32", shape=[1])
        message.raw_output_contents.append(np.array([number], dtype=np.int32).tobytes())
    message.parameters["triton_final_response"].bool_param = final
    return message


def the_end() -> Any:
    """The response that only says the end."""
    message = service_pb2.ModelInferResponse(model_name="nvlm")
    message.parameters["triton_final_response"].bool_param = True
    return message


class FakeTriton(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Answers `1`, `9`, and then does what the question says; or what follows `say`."""

    def __init__(self, address: str = "127.0.0.1:0") -> None:
        self.requests: list[dict[str, list[Any]]] = []
        self.is_ready = True
        self.cancelled = threading.Event()
        self._server = grpc.server(ThreadPoolExecutor(8), options=[("grpc.max_receive_message_length", -1)])
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(address)
        self._server.start()

    def __enter__(self) -> FakeTriton:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(grace=None).wait()

    @property
    def url(self) -> str:
        return f"127.0.0.1:{self.port}"

    def ModelReady(self, request: Any, context: Any) -> Any:  # noqa: N802  # Triton's name
        return service_pb2.ModelReadyResponse(ready=self.is_ready)

    def ModelStreamInfer(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:  # noqa: N802
        context.add_callback(self.cancelled.set)
        values = received(next(requests))
        self.requests.append(values)
        question = values["text_input"][0].decode()
        if question.startswith("say "):
            yield of(piece(question.removeprefix("say ")))
        elif question != "silence":
            yield of(piece("1"))
            yield of(piece("9"))
        if question in ("hang", "silence"):
            while context.is_active():
                time.sleep(0.01)
        elif question == "refuse":
            yield service_pb2.ModelStreamInferResponse(error_message="INVALID_ARGUMENT: no\n  hint: do not")
        elif question == "fail":
            yield service_pb2.ModelStreamInferResponse(error_message="INTERNAL: RuntimeError: oops")
        elif question == "cancel":
            context.abort(grpc.StatusCode.CANCELLED, "the server does not want to")
        elif question != "stop early":
            yield of(piece("", tokens=0, reason="" if question == "cut" else "stop"))
            yield of(the_end())


def of(response: Any) -> Any:
    return service_pb2.ModelStreamInferResponse(infer_response=response)


def received(request: Any) -> dict[str, list[Any]]:
    """The request's tensors, read with NVIDIA's own functions."""
    values = {}
    for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True):
        if tensor.datatype == "BYTES":
            values[tensor.name] = deserialize_bytes_tensor(raw).tolist()
        else:
            dtype = {"BOOL": "bool", "FP32": "float32"}.get(tensor.datatype, tensor.datatype.lower())
            values[tensor.name] = np.frombuffer(raw, dtype).tolist()
        assert list(tensor.shape) == [len(values[tensor.name])]
    return values


class Relay:
    """Carries bytes between a port of its own and `target`, until it is cut."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._pairs: list[socket.socket] = []
        self._listening: socket.socket | None = None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.connect()

    @property
    def url(self) -> str:
        return f"127.0.0.1:{self.port}"

    def connect(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=[self._listening], daemon=True).start()

    def cut(self) -> None:
        """Close everything, in the middle of whatever is said."""
        listening, self._listening = self._listening, None
        if listening is not None:
            with contextlib.suppress(OSError):
                listening.shutdown(socket.SHUT_RDWR)
            listening.close()
        for one in self._pairs:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        self._pairs.clear()

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *_: object) -> None:
        self.cut()

    def _accept(self, listening: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listening.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                self._pairs += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=_carry, args=[source, sink], daemon=True).start()


def _carry(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
