"""The repository of a GPU profile before the real tritonserver: the same ensemble, TensorRT-LLM's backend in its place.

That backend cannot be installed here. Without it Triton reads every config and names what it lacks; with a stand-in of
its name (tests/llm/fakes/backends), which asks what the C++ code asks, the whole ensemble answers.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvlm_deploy.recipe import Recipe
from nvlm_deploy.steps.order import pipeline_of
from nvlm_deploy.triton import server as servers
from nvlm_deploy.triton.server import Ports, ServerChoices, TritonServer

MACHINE = Path(__file__).parents[1] / "machine"
if str(MACHINE) not in sys.path:
    sys.path.insert(0, str(MACHINE))

from gpu_build import BACKEND, ON_CPU, gpu_profile, two_l40s  # noqa: E402

pytestmark = pytest.mark.slow

QUESTION = "größer als 日本? 🙂"


@pytest.fixture(scope="module")
def engines(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One rank, and the encoder on the CPU: what can run, does."""
    root = tmp_path_factory.mktemp("gpu")
    profile = gpu_profile(tensor_parallel=1).model_copy(update={"vision": ON_CPU})
    recipe = Recipe(tiny_folder, profile, root / "work")
    with pytest.MonkeyPatch.context() as patched:
        two_l40s(root, patched)
        list(pipeline_of(recipe).run())
    return recipe.repository


@pytest.fixture(scope="module")
def bundled() -> Iterator[pytest.MonkeyPatch]:
    """The wheel's server, though the repository asks for the container's."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(servers, "engine_facts", lambda *_: None)
        yield patched


def states(url: str) -> dict[str, tuple[str, str]]:
    from tritonclient import grpc

    with grpc.InferenceServerClient(url) as client:
        return {model.name: (model.state, model.reason) for model in client.get_model_repository_index().models}


def test_without_the_backend_triton_lacks_nothing_else(engines: Path, bundled: pytest.MonkeyPatch) -> None:
    choices = ServerChoices(Ports.free(), extra_arguments=("--exit-on-error=false", "--strict-readiness=false"))
    with TritonServer(engines, choices) as server:
        found = states(server.grpc_url)
    reason = found["tensorrt_llm"][1]
    assert "unable to find backend library for backend 'tensorrtllm'" in reason
    ready = {name for name, (state, _) in found.items() if state == "READY"}
    assert ready == {"preprocessing", "vision_encoder", "text_decoder", "postprocessing", "nvlm"}


@pytest.fixture(scope="module")
def url(engines: Path, bundled: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a repository that was moved."""
    honest = servers.prepare_backend

    def with_stand_in(installation: object, folder: Path) -> None:
        honest(installation, folder)
        shutil.copytree(BACKEND, folder / BACKEND.name, ignore=shutil.ignore_patterns("__pycache__"))

    moved = tmp_path_factory.mktemp("elsewhere") / "repository"
    shutil.copytree(engines, moved)
    bundled.setattr(servers, "prepare_backend", with_stand_in)
    with TritonServer(moved, ServerChoices(Ports.free())) as server:
        yield server.grpc_url


@pytest.fixture
def asker(url: str, caller_of):
    return caller_of(url)


def test_every_request_is_what_the_backend_takes_and_its_answer_streams(asker) -> None:
    answer = asker.ask(QUESTION, max_tokens=200, seed=3)
    assert answer.error is None
    assert QUESTION in answer.text, "characters of several tokens are whole, though each token comes by itself"
    assert answer.output_tokens == len(answer.pieces) - 1 > len(QUESTION) / 2, "the last says the end and has no token"
    assert answer.finish_reason == b"stop"
    assert answer.final_flags.count(True) == 1


def test_pictures_take_rows_of_the_table_with_an_id_each(asker, picture) -> None:
    answer = asker.ask(QUESTION, image=[picture(), picture(168, 112, seed=1)], max_tokens=8)
    assert answer.error is None
    assert answer.input_tokens > 2 * 16


def test_an_answer_in_one_piece_is_the_streamed_one(asker) -> None:
    whole = asker.ask(QUESTION, stream=False, max_tokens=40)
    assert len(whole.pieces) == 1
    assert whole.text == asker.ask(QUESTION, max_tokens=40).text
