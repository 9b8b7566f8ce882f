"""A servable model of random weights in the small model's shapes, and a server that runs it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="session")
def decoder_folder(random_checkpoint, tiny_spec, tmp_path_factory) -> Path:
    """The random decoder as a BF16 TensorRT-LLM checkpoint."""
    from nvlm_deploy.llm.trtllm import trtllm_checkpoint_from

    folder = tmp_path_factory.mktemp("decoder")
    trtllm_checkpoint_from(random_checkpoint, tiny_spec, folder, calibration=None)
    return folder


@pytest.fixture(scope="session")
def repository(tiny_spec, exported_vision, decoder_folder, tokenizer_file, tmp_path_factory) -> Path:
    from nvlm_deploy.triton.choices import ServingChoices
    from nvlm_deploy.triton.repository import RepositorySources, write_repository

    folder = tmp_path_factory.mktemp("repository")
    sources = RepositorySources(exported_vision.parent, decoder_folder, tokenizer_file, tiny_spec)
    write_repository(folder, sources, ServingChoices(max_batch_size=8, max_seq_len=512))
    return folder


@pytest.fixture(scope="session")
def server(repository) -> Iterator[object]:
    from nvlm_deploy.triton.server import Ports, ServerChoices, TritonServer

    with TritonServer(repository, ServerChoices(ports=Ports.free())) as server:
        yield server


class Answer:
    """All responses to one request, or its error."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.finish_reason = b""
        self.input_tokens = self.output_tokens = 0
        self.final_flags: list[bool] = []
        self.error: Exception | None = None

    @property
    def text(self) -> str:
        return b"".join(self.pieces).decode()

    def add(self, result) -> None:
        response = result.get_response()
        self.final_flags.append(response.parameters["triton_final_response"].bool_param)
        if not response.outputs:
            return
        self.pieces.append(result.as_numpy("text_output")[0])
        self.finish_reason = result.as_numpy("finish_reason")[0]
        self.input_tokens = int(result.as_numpy("num_input_tokens")[0])
        self.output_tokens += int(result.as_numpy("num_output_tokens")[0])


INPUT_TYPES = {
    "text_input": ("BYTES", np.object_),
    "image": ("BYTES", np.object_),
    "stop_words": ("BYTES", np.object_),
    "max_tokens": ("INT32", np.int32),
    "top_k": ("INT32", np.int32),
    "temperature": ("FP32", np.float32),
    "top_p": ("FP32", np.float32),
    "repetition_penalty": ("FP32", np.float32),
    "seed": ("UINT64", np.uint64),
    "stream": ("BOOL", np.bool_),
}


class Caller:
    """A bare gRPC client of the ensemble: one bidirectional stream per request."""

    def __init__(self, url: str) -> None:
        self.url = url

    def inputs(self, text: str, **values):
        from tritonclient import grpc

        inputs = []
        for name, value in {"text_input": text.encode(), "stream": True, **values}.items():
            kind, dtype = INPUT_TYPES[name]
            array = np.array(value if isinstance(value, list) else [value], dtype=dtype)
            inputs.append(grpc.InferInput(name, list(array.shape), kind))
            inputs[-1].set_data_from_numpy(array)
        return inputs

    def ask(self, text: str, *, request_id: str | None = None, timeout_s: float = 60, **values) -> Answer:
        import queue
        import uuid

        from tritonclient import grpc

        answer, responses = Answer(), queue.Queue()
        with grpc.InferenceServerClient(self.url) as client:
            client.start_stream(lambda result, error: responses.put((result, error)))
            client.async_stream_infer(
                "nvlm",
                self.inputs(text, **values),
                request_id=str(uuid.uuid4()) if request_id is None else request_id,
                enable_empty_final_response=True,
            )
            while not (answer.final_flags and answer.final_flags[-1]):
                result, answer.error = responses.get(timeout=timeout_s)
                if answer.error is not None:
                    break
                answer.add(result)
        return answer


@pytest.fixture(scope="session")
def caller_of() -> type[Caller]:
    """For a server of the test's own."""
    return Caller


@pytest.fixture(scope="session")
def caller(server) -> Caller:
    return Caller(server.grpc_url)


@pytest.fixture(scope="session")
def picture():
    """Makes an encoded picture of a size, different for each seed."""
    import io

    from PIL import Image

    def make(width: int = 112, height: int = 56, *, seed: int = 0, kind: str = "PNG") -> bytes:
        pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, kind)
        return stream.getvalue()

    return make
