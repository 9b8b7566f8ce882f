"""A servable model of random weights in the small model's shapes, and a server that runs it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

MODELS = Path(__file__).parents[1] / "models"


def _model_module(name: str) -> ModuleType:
    """A module of tests/models, which is a folder of scripts."""
    if str(MODELS) not in sys.path:
        sys.path.insert(0, str(MODELS))
    return importlib.import_module(name)


@pytest.fixture(scope="session")
def spec():
    from nvlm_deploy.model.spec import spec_from_config

    return spec_from_config(_model_module("folder").config(), padded_heads=11)


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    _model_module("tokenizer").write_tokenizer(path)
    return path


@pytest.fixture(scope="session")
def random_decoder(spec):
    import torch

    from nvlm_deploy.model.decoder import Decoder

    torch.manual_seed(0)
    decoder = Decoder(spec.decoder).requires_grad_(False).eval()
    for name, weight in decoder.named_parameters():
        if weight.ndim == 2:
            weight.normal_(std=1.0 if "embed" in name else 1.5 / weight.shape[1] ** 0.5)
    return decoder.to(torch.bfloat16)


@pytest.fixture(scope="session")
def decoder_folder(random_decoder, spec, tmp_path_factory) -> Path:
    import torch

    from nvlm_deploy.checkpoint.trtllm import checkpoint_writer
    from nvlm_deploy.checkpoint.trtllm_layout import Layout

    folder = tmp_path_factory.mktemp("decoder")
    layout = Layout(spec.decoder)
    weights = random_decoder.state_dict()
    with checkpoint_writer(folder, layout) as writer:
        for tensor in layout.tensors:
            writer.put(tensor, torch.cat([weights[source] for source in tensor.sources]))
    return folder


@pytest.fixture(scope="session")
def vision_folder(spec, tmp_path_factory) -> Path:
    """A stand-in for the encoder: each quarter of a tile's bytes through one random matrix."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    size, tokens, hidden = spec.tiling.tile_size, spec.tiling.tokens_per_tile, spec.decoder.hidden_size
    width = size * size * 3 // tokens
    matrix = np.random.default_rng(0).normal(size=(width, hidden)).astype(np.float32) / (width**0.5 * 64)
    nodes = [
        helper.make_node("Cast", ["tiles"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["wide", "shape"], ["rows"]),
        helper.make_node("MatMul", ["rows", "matrix"], ["embeddings"]),
    ]
    graph = helper.make_graph(
        nodes,
        "stand_in",
        [helper.make_tensor_value_info("tiles", TensorProto.UINT8, ["tiles", size, size, 3])],
        [helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, ["tiles", tokens, hidden])],
        [
            numpy_helper.from_array(matrix, "matrix"),
            numpy_helper.from_array(np.array([-1, tokens, width], dtype=np.int64), "shape"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    folder = tmp_path_factory.mktemp("vision")
    onnx.save(model, folder / "vision.onnx")
    return folder


@pytest.fixture(scope="session")
def repository(spec, vision_folder, decoder_folder, tokenizer_file, tmp_path_factory) -> Path:
    from nvlm_deploy.triton.ensemble import ServingChoices
    from nvlm_deploy.triton.repository import RepositorySources, write_repository

    folder = tmp_path_factory.mktemp("repository")
    sources = RepositorySources(vision=vision_folder, decoder=decoder_folder, tokenizer=tokenizer_file, spec=spec)
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
        self.output_tokens = int(result.as_numpy("num_output_tokens")[0])


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

    def status_of(self, text: str, **values):
        """The gRPC status that a failing request ends its stream with, when the client asks for real statuses."""
        from tritonclient import grpc

        with grpc.InferenceServerClient(self.url) as client:
            errors = []
            client.start_stream(lambda result, error: errors.append(error), headers={"triton_grpc_error": "true"})
            client.async_stream_infer("nvlm", self.inputs(text, **values))
            client.stop_stream()
        return [(error.status(), error.message()) for error in errors if error is not None]


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
