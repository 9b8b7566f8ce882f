"""Both clients against a real server with random weights."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from both_clients import BOTH
from PIL import Image

from nvlm_deploy.bench.latency import measure_latencies
from nvlm_deploy.client import AnswerCancelled, Generation, NvlmClient
from nvlm_deploy.errors import MachineError, NvlmError
from nvlm_deploy.samples import Sample
from nvlm_deploy.validate.over_server import answers_from_server

pytestmark = pytest.mark.slow

EIGHT = Generation(max_tokens=8)


def small_png() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def image(picture) -> bytes:
    return picture(168, 112)


@pytest.fixture(params=BOTH)
def client_class(request):
    """NvlmClient, then AsyncNvlmClient behind the same methods."""
    return BOTH[request.param]


@pytest.fixture
def client(client_class, server):
    with client_class(server.grpc_url) as client:
        yield client


def test_the_pieces_are_the_answer(client, image: bytes) -> None:
    stream = client.ask("Which digit is in tile 3?", [image], EIGHT)
    assert "".join(stream) == stream.answer().text


def test_every_token_arrives_by_itself(client) -> None:
    answer = client.ask("What is 12 plus 7?", (), EIGHT).answer()
    assert [piece.output_tokens for piece in answer.pieces][:7] == list(range(1, 8))
    assert answer.sent_s < answer.pieces[0].arrived_s <= answer.pieces[-1].arrived_s <= answer.ended_s


def test_the_asked_number_of_tokens_is_a_length(client) -> None:
    answer = client.ask("What is 12 plus 7?", (), Generation(max_tokens=1)).answer()
    assert (answer.finish_reason, answer.num_output_tokens) == ("length", 1)


def test_an_image_makes_the_prompt_longer(client, image: bytes) -> None:
    counts = [client.ask("hello", [image] * n, EIGHT).answer().num_input_tokens for n in (0, 1, 2)]
    assert counts[0] < counts[1] < counts[2]


def test_both_clients_get_the_same_answer(server, image: bytes) -> None:
    texts = set()
    for kind in BOTH.values():
        with kind(server.grpc_url) as client:
            texts.add(client.ask("hello", [image], EIGHT).answer().text)
    assert len(texts) == 1


def test_an_image_gets_the_same_answer_however_it_is_held(client, image: bytes, tmp_path) -> None:
    """Photographs as JPEG that a viewer turns are among them."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(io.BytesIO(image)).save(tmp_path / "turned.jpg", exif=exif)
    for encoded in (image, (tmp_path / "turned.jpg").read_bytes()):
        path = tmp_path / "photo"
        path.write_bytes(encoded)
        held = [path, str(path), encoded, bytearray(encoded), memoryview(encoded), io.BytesIO(encoded), path.open("rb")]
        held.append(Image.open(path))
        answers = [client.ask("hello", [one], EIGHT).answer() for one in held]
        assert len({(answer.text, answer.num_input_tokens) for answer in answers}) == 1
    array = np.asarray(Image.open(io.BytesIO(image)))
    assert client.ask("hello", array, EIGHT).answer().text == client.ask("hello", image, EIGHT).answer().text


def test_a_seed_draws_the_same_answer_again(client) -> None:
    drawn = Generation(max_tokens=16, temperature=2.0, top_k=500, seed=11)
    first, second = (client.ask("hello", (), drawn).answer().text for _ in range(2))
    assert first == second
    assert first != client.ask("hello", (), Generation(max_tokens=16)).answer().text


@pytest.mark.parametrize(
    ("question", "images", "generation", "telling"),
    [
        ("", (), EIGHT, "empty"),
        ("hello", (b"no picture",), EIGHT, "not an image"),
        ("<image> <image> hello", (small_png(),), EIGHT, "placeholder"),
        ("hello", (), Generation(max_tokens=0), "max_tokens is 0"),
        ("hello", (), Generation(max_tokens=10**9), "max_seq_len"),
        ("hello", (), Generation(max_tokens=-1), "max_tokens is -1"),
        ("hello", (), Generation(temperature=-1), "temperature is -1"),
        ("hello", (), Generation(top_p=1.5), "top_p is 1.5"),
        ("hello", (), Generation(top_k=-1), "top_k is -1"),
        ("hello", (), Generation(repetition_penalty=0), "repetition_penalty is 0"),
        ("hello", (), Generation(stop_words=[f"x{n}" for n in range(65)]), "stop_words holds 65 words"),
    ],
)
def test_a_refused_request_is_wrong_input(client, question, images, generation, telling: str) -> None:
    with pytest.raises(NvlmError, match=telling) as refused:
        client.ask(question, images, generation).answer()
    assert type(refused.value) is NvlmError
    assert refused.value.partial == ""
    assert client.ask("hello", (), EIGHT).answer().text


def test_a_hint_of_the_server_is_the_hint_of_the_error(client) -> None:
    with pytest.raises(NvlmError) as refused:
        client.ask("<image> <image> hello", small_png()).answer()
    assert refused.value.hint
    assert refused.value.hint not in refused.value.message


def test_many_refused_requests_leave_the_server_alive(client) -> None:
    """With the header `triton_grpc_error` the second or third of these kills tritonserver 2.51."""
    for _ in range(30):
        with pytest.raises(NvlmError):
            client.ask("").answer()
    assert client.ask("hello", (), EIGHT).answer().text


def test_a_server_of_something_else_says_so(client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nvlm_deploy.client.wire.ENSEMBLE", "another_model")
    with pytest.raises(NvlmError, match="has no model nvlm"):
        client.ask("hello").answer()


def test_a_deadline_is_kept(client_class, server) -> None:
    """At this temperature the end comes once in hundreds of tokens, and never within a hundredth of a second."""
    long = Generation(max_tokens=480, temperature=5.0, top_k=500)
    with client_class(server.grpc_url, timeout_s=0.01) as hurried, pytest.raises(MachineError, match="in time"):
        hurried.ask("hello", (), long).answer()


def test_what_had_come_is_kept_by_a_timeout_and_by_a_cancellation(client_class, server) -> None:
    long = Generation(max_tokens=480, temperature=5.0, top_k=500, seed=3)
    with client_class(server.grpc_url, timeout_s=1) as hurried:
        stream = hurried.ask("hello", (), long)
        first = next(stream)
        time.sleep(1.5)
        with pytest.raises(MachineError, match="in time") as late:
            stream.answer()
        assert late.value.partial.startswith(first)
        stream = hurried.ask("hello", (), long)
        first = next(stream)
        stream.cancel()
        with pytest.raises(AnswerCancelled) as cancelled:
            stream.answer()
        assert cancelled.value.partial == first


def test_who_gives_the_http_port_is_told_so(client_class, server) -> None:
    with client_class(server.choices.ports.http_url, timeout_s=20) as client, pytest.raises(MachineError) as failure:
        client.ask("hello").answer()
    assert "8000 is HTTP" in (failure.value.hint or "")


def test_a_running_server_is_ready(client) -> None:
    client.wait_until_ready(10)


def test_a_server_that_ends_in_the_middle_leaves_the_text_so_far(repository) -> None:
    """Killed, and then stopped with its patience at an end."""
    from nvlm_deploy.triton.server import Ports, ServerChoices, TritonServer

    long = Generation(max_tokens=480, temperature=5.0, top_k=500, seed=3)
    choices = ServerChoices(ports=Ports.free(), exit_timeout_s=1)
    for ends in (lambda server: os.kill(server.process_id, signal.SIGKILL), lambda server: server.stop()):
        with TritonServer(repository, choices) as server, contextlib.ExitStack() as clients:
            opened = [clients.enter_context(kind(server.grpc_url, timeout_s=60)) for kind in BOTH.values()]
            streams = [client.ask("hello", (), long) for client in opened]
            firsts = [next(stream) for stream in streams]
            ends(server)
            for client, stream, first in zip(opened, streams, firsts, strict=True):
                with pytest.raises(MachineError, match=r"broke in the middle|failed") as failure:
                    stream.answer()
                assert failure.value.partial.startswith(first)
                with pytest.raises(MachineError, match="no server answers"):
                    client.ask("hello").answer()


def test_a_cancelled_answer_frees_its_place(client) -> None:
    """More of them than there are places."""
    for _ in range(10):
        stream = client.ask("hello", (), Generation(max_tokens=400))
        next(iter(stream))
        stream.cancel()
    started = time.monotonic()
    client.ask("hello", (), Generation(max_tokens=2)).answer()
    assert time.monotonic() - started < 10


def test_many_answers_come_in_the_order_of_their_questions(server, tmp_path, image: bytes) -> None:
    (tmp_path / "picture.png").write_bytes(image)
    samples = [
        Sample(question=f"question {number}", answer="", images=(tmp_path / "picture.png",) * (number % 2))
        for number in range(12)
    ]
    together = answers_from_server(server.grpc_url, samples, max_tokens=6, concurrency=12)
    alone = answers_from_server(server.grpc_url, samples, max_tokens=6, concurrency=1)
    assert [answer.num_input_tokens for answer in together] == [answer.num_input_tokens for answer in alone]


def test_latency_is_of_the_requests_that_were_counted(server) -> None:
    samples = [Sample(question=f"question {number}", answer="") for number in range(4)]
    done = []
    (latency,) = measure_latencies(
        [server.grpc_url], samples, max_tokens=4, warm_up=2, on_sample=lambda: done.append(1)
    )
    assert latency.n == len(done) == 4
    assert 0 < latency.time_to_first_token.p50_ms < latency.end_to_end.p50_ms


def test_ctrl_c_ends_nvlm_ask_with_130_and_the_server_lives(server, client: NvlmClient) -> None:
    command = [sys.executable, "-c", "from nvlm_deploy.cli.main import run; run()", "ask", "hello"]
    arguments = ["--url", server.grpc_url, "--max-tokens", "480", "--top-k", "500", "--temperature", "5"]
    asking = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert asking.stdout is not None
    asking.stdout.read(1)
    asking.send_signal(signal.SIGINT)
    _, problem = asking.communicate(timeout=20)
    assert asking.returncode == 130
    assert b"Traceback" not in problem
    assert client.ask("hello", (), EIGHT).answer().text
