"""The real tritonserver with the whole ensemble, on random weights in the small model's shapes."""

from __future__ import annotations

import io
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from nvlm_deploy.errors import MachineError

pytestmark = pytest.mark.slow

QUESTION = "Which digit is in tile 3?"
MAX_SEQ_LEN = 512


def png_header(width: int, height: int) -> bytes:
    """A PNG file that claims a size, with next to no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    content = chunk(b"IHDR", size + bytes([8, 2, 0, 0, 0])) + chunk(b"IDAT", zlib.compress(bytes(16)))
    return b"\x89PNG\r\n\x1a\n" + content + chunk(b"IEND", b"")


def test_each_generated_token_is_one_response_and_only_the_last_is_final(caller) -> None:
    answer = caller.ask("What is 12 plus 7?", max_tokens=12)
    assert answer.error is None
    assert len(answer.pieces) == 12
    assert answer.final_flags == [False] * 11 + [True]
    assert answer.output_tokens == 12


def test_the_streamed_pieces_are_the_unstreamed_answer(caller, picture) -> None:
    question = {"image": [picture()], "max_tokens": 24}
    whole = caller.ask(QUESTION, stream=False, **question)
    assert len(whole.pieces) == 1
    assert caller.ask(QUESTION, **question).text == whole.text


def test_a_request_without_an_id_is_answered_as_one_with_an_id(caller) -> None:
    assert caller.ask("hi", request_id="", max_tokens=30).pieces == caller.ask("hi", max_tokens=30).pieces


def test_images_count_as_prompt_tokens_by_their_tiles(caller, picture, tiny_spec) -> None:
    def tokens(**images) -> int:
        return caller.ask(QUESTION, max_tokens=1, **images).input_tokens

    per_tile = tiny_spec.tiling.tokens_per_tile + 5
    text, square, wide = tokens(), tokens(image=[picture(56, 56)]), tokens(image=[picture(112, 56)])
    assert wide - square == 2 * per_tile
    assert tokens(image=[picture(56, 56), picture(112, 56)]) - text == (square - text) + (wide - text)


def test_a_different_picture_gives_a_different_answer(caller, picture) -> None:
    answers = {caller.ask(QUESTION, image=[picture(seed=seed)], max_tokens=16).text for seed in range(4)}
    assert len(answers) == 4


def test_the_same_seed_gives_the_same_sample_and_another_seed_another(caller) -> None:
    sampled = {"temperature": 1.5, "top_k": 50, "top_p": 0.95, "max_tokens": 16}
    first = caller.ask("hi", seed=7, **sampled).text
    assert caller.ask("hi", seed=7, **sampled).text == first
    assert caller.ask("hi", seed=8, **sampled).text != first


def test_without_a_seed_samples_differ(caller) -> None:
    assert len({caller.ask("hi", temperature=2.0, max_tokens=16).text for _ in range(4)}) > 1


def test_a_stop_word_ends_the_answer_before_it_with_reason_stop(caller) -> None:
    full = caller.ask("What is 12 plus 7?", max_tokens=40)
    word = next(piece for piece in full.pieces if piece.isascii() and len(piece) > 1)
    stopped = caller.ask("What is 12 plus 7?", max_tokens=40, stop_words=[word])
    assert stopped.finish_reason == b"stop"
    assert stopped.text == full.text[: full.text.index(word.decode())]


def test_32_concurrent_requests_answer_as_one_by_one(caller, picture) -> None:
    def ask(number: int):
        images = [picture(56 * (1 + number % 3), 56, seed=number + each) for each in range(number % 3)]
        extra = {"image": images} if images else {}
        return caller.ask(f"How many tiles show {number}?", max_tokens=16 + number % 8, **extra)

    alone = [ask(number) for number in range(32)]
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(ask, range(32)))
    assert [answer.error for answer in together] == [None] * 32
    assert [answer.text for answer in together] == [answer.text for answer in alone]


@pytest.mark.parametrize(
    ("request_", "word"),
    [
        ({"image": [b"plain text"]}, "image 1 of 1: not an image"),
        ({"image": "truncated"}, "image 2 of 2: the image is damaged or truncated"),
        ({"image": [png_header(0, 7)]}, "image 1 of 1"),
        ({"image": [png_header(20_000, 20_000)]}, "the limit is 89,000,000"),
        ({"image": "400"}, "400 images, at most 16"),
        ({"text": "<image> and <image>?", "image": "one"}, "2 <image> placeholder(s), the request 1 image(s)"),
        ({"text": "<image>?", "image": "two"}, "1 <image> placeholder(s), the request 2 image(s)"),
        ({"text": " \n"}, "question is empty"),
        ({"text": "seven " * 2000}, f"bytes can fit into {MAX_SEQ_LEN} tokens"),
        ({"text": "in " * 600}, f"with the answer at most {MAX_SEQ_LEN}"),
        ({"stop_words": [str(number).encode() for number in range(65)]}, "stop_words holds 65 words"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": 10**9}, "max_tokens is 1000000000, at most"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": -3}, "top_k is -3"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else None,
)
def test_a_bad_request_fails_alone_with_a_telling_error(caller, picture, request_, word) -> None:
    good = picture(56, 56)
    jpeg = picture(kind="JPEG")
    named = {"truncated": [good, jpeg[: len(jpeg) // 2]], "400": [good] * 400, "one": [good], "two": [good, good]}
    values = {"text": QUESTION, "max_tokens": 4, **request_}
    if isinstance(values.get("image"), str):
        values["image"] = named[values["image"]]
    answer = caller.ask(**values)
    assert answer.error is not None
    assert "INVALID_ARGUMENT: " in answer.error.message()
    assert word in answer.error.message()
    assert caller.ask("hi", max_tokens=2).error is None


def test_an_input_the_model_does_not_have_is_refused(server) -> None:
    from tritonclient import grpc
    from tritonclient.utils import InferenceServerException

    tensor = grpc.InferInput("top_q", [1], "FP32")
    tensor.set_data_from_numpy(np.ones(1, dtype=np.float32))
    with grpc.InferenceServerClient(server.grpc_url) as client:
        with pytest.raises(InferenceServerException, match="top_q") as failure:
            client.infer("vision_encoder", [tensor])
        assert failure.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_a_question_that_is_refused_over_http_is_a_bad_request(server) -> None:
    import urllib.error
    import urllib.request

    url = f"http://127.0.0.1:{server.choices.ports.http}/v2/models/nvlm/generate"
    request = urllib.request.Request(url, b'{"text_input": "", "max_tokens": 2}')
    with pytest.raises(urllib.error.HTTPError) as failure:
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60)
    assert failure.value.code == 400
    assert b"the question is empty" in failure.value.read()


class DecoderCaller:
    """Talks to the decoder alone, in the names of the C++ backend."""

    def __init__(self, url: str) -> None:
        from tritonclient import grpc

        self.grpc = grpc
        self.client = grpc.InferenceServerClient(url)
        self.responses: list = []
        self.client.start_stream(lambda result, error: self.responses.append((result, error)))

    def send(self, request_id: str = "", *, prompt=(5, 6, 7), max_tokens: int = 4, **extra) -> None:
        arrays = {
            "input_ids": np.array([prompt], dtype=np.int32),
            "input_lengths": np.array([[len(prompt)]], dtype=np.int32),
            "request_output_len": np.array([[max_tokens]], dtype=np.int32),
            **{name: np.array([[value]]) for name, value in extra.items()},
        }
        kinds = {"int32": "INT32", "float32": "FP32", "bool": "BOOL"}
        inputs = [self.grpc.InferInput(name, list(a.shape), kinds[str(a.dtype)]) for name, a in arrays.items()]
        for tensor, array in zip(inputs, arrays.values(), strict=True):
            tensor.set_data_from_numpy(array)
        self.client.async_stream_infer("tensorrt_llm", inputs, request_id=request_id, enable_empty_final_response=True)

    def wait(self, count: int, timeout_s: float = 20) -> list:
        deadline = time.monotonic() + timeout_s
        while len(self.responses) < count and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(self.responses) >= count
        return self.responses

    def stop(self) -> None:
        self.client.stop_stream(cancel_requests=True)
        self.client.close()


@pytest.fixture
def decoder_caller(server):
    caller = DecoderCaller(server.grpc_url)
    yield caller
    caller.stop()


@pytest.mark.parametrize(
    ("extra", "word"),
    [
        ({"beam_width": np.int32(4)}, "beam_width"),
        ({"return_log_probs": np.True_}, "return_log_probs"),
        ({"lookahead_window_size": np.int32(2)}, "lookahead_window_size"),
        ({"temperature": np.float32(0)}, "temperature is 0.0"),
        ({"prompt": (5, 6, 7, 512)}, "row 0 of a prompt table with 0 rows"),
        ({"prompt": (5, -1)}, "not negative"),
        ({"max_tokens": 510}, "exceed max_seq_len 512"),
    ],
)
def test_the_decoder_refuses_by_name_what_it_cannot_honour(decoder_caller, extra, word) -> None:
    decoder_caller.send(**extra)
    _, error = decoder_caller.wait(1)[0]
    assert word in error.message()


def test_the_decoder_accepts_what_changes_nothing(decoder_caller) -> None:
    decoder_caller.send(beam_width=np.int32(1), return_log_probs=np.False_, len_penalty=np.float32(2))
    result, error = decoder_caller.wait(1)[0]
    assert error is None
    assert result.as_numpy("output_ids").shape == (1, 1, 3 + 4)


def test_without_exclude_input_the_prompt_comes_back(decoder_caller) -> None:
    decoder_caller.send(prompt=(9, 8))
    result, _ = decoder_caller.wait(1)[0]
    assert result.as_numpy("output_ids")[0, 0, :2].tolist() == [9, 8]


def cancelled_in_log(server, request_id: str) -> bool:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        if f"request '{request_id}' was cancelled after" in server.log_file.read_text():
            return True
        time.sleep(0.05)
    return False


def test_cancelling_the_decoders_stream_ends_the_generation(server) -> None:
    caller = DecoderCaller(server.grpc_url)
    caller.send("cancelled-directly", max_tokens=500, streaming=np.True_)
    caller.wait(2)
    caller.stop()
    assert cancelled_in_log(server, "cancelled-directly")


@pytest.fixture(scope="module")
def endless(caller) -> str:
    """A question that the random model never stops answering by itself."""
    questions = (f"count from {number}" for number in range(20))
    return next(question for question in questions if caller.ask(question, max_tokens=480).output_tokens == 480)


def test_a_stop_request_under_a_clients_id_ends_nobodys_answer(caller, endless, decoder_caller) -> None:
    """What a client calls its request is no name for it inside the server."""
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(caller.ask, endless, request_id="named-by-a-client", max_tokens=480)
        time.sleep(0.3)
        decoder_caller.send("named-by-a-client", stop=np.True_)
        answer = running.result(timeout=60)
    assert answer.output_tokens == 480


def test_a_client_that_goes_away_ends_the_generation(server, caller, endless) -> None:
    from tritonclient import grpc

    responses: list = []
    with grpc.InferenceServerClient(server.grpc_url) as client:
        client.start_stream(lambda result, error: responses.append(error))
        client.async_stream_infer("nvlm", caller.inputs(endless, max_tokens=480), request_id="gone-away")
        while len(responses) < 2:
            time.sleep(0.01)
        client.stop_stream(cancel_requests=True)
    assert cancelled_in_log(server, "gone-away")
    assert caller.ask("hi", max_tokens=4).error is None


def test_memory_stays_flat(server, caller, picture) -> None:
    def size_bytes() -> int:
        family = psutil.Process(server.process_id)
        return sum(process.memory_info().rss for process in (family, *family.children(recursive=True)))

    def load(requests: int) -> None:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda n: caller.ask(QUESTION, image=[picture(seed=n)], max_tokens=4), range(requests)))

    load(60)
    before = size_bytes()
    load(120)
    assert size_bytes() - before < 8_000_000


# starting and stopping


def test_a_port_in_use_is_named_before_anything_starts(repository) -> None:
    from nvlm_deploy.triton.server import Ports, ServerChoices, TritonServer

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        free = Ports.free()
        choices = ServerChoices(ports=Ports(grpc=port, http=free.http, metrics=free.metrics))
        with pytest.raises(MachineError, match=f"gRPC port {port}") as failure, TritonServer(repository, choices):
            pass
    assert failure.value.exit_code == 3
    assert "choose another port" in str(failure.value)


def test_two_servers_run_side_by_side_and_leave_nothing_behind(server, repository) -> None:
    from nvlm_deploy.triton.server import Ports, ServerChoices, TritonServer

    with TritonServer(repository, ServerChoices(ports=Ports.free())) as second:
        shared_memory = list(Path("/dev/shm").glob(f"{second.memory_name}*"))
        assert shared_memory
        family = [psutil.Process(second.process_id), *psutil.Process(second.process_id).children(recursive=True)]
        assert len(family) == 6
        assert second.process_id != server.process_id
    assert not [process for process in family if process.is_running()]
    assert not [path for path in shared_memory if path.exists()]


def test_a_server_that_cannot_load_shows_its_log(repository, tmp_path) -> None:
    import shutil

    from nvlm_deploy.triton.server import Ports, ServerChoices, TritonServer

    broken = tmp_path / "broken"
    shutil.copytree(repository, broken)
    (broken / "preprocessing" / "1" / "tokenizer.json").write_text("{}")
    with (
        pytest.raises(MachineError, match=r"(?s)ended with status.*not a readable tokenizer") as failure,
        TritonServer(broken, ServerChoices(ports=Ports.free())),
    ):
        pass
    cause = failure.value.message.splitlines()[1]
    assert cause.startswith(f"  model preprocessing: NvlmError: {broken}/preprocessing/1/tokenizer.json is not")
    for always in ("CUDA", "NVML", "DCGM"):
        assert always not in failure.value.message


@pytest.mark.parametrize(
    ("line", "telling"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "was killed by signal 11 (SIGSEGV)"),
        ("os._exit(3)", "ended with status 3"),
    ],
)
def test_a_model_whose_process_dies_while_loading_is_named_with_how(repository, tmp_path, line, telling) -> None:
    from nvlm_deploy.triton.server import Ports, ServerChoices, TritonServer

    broken = tmp_path / "broken"
    shutil.copytree(repository, broken)
    model = broken / "postprocessing" / "1" / "model.py"
    model.write_text(f"import os, signal, time\ntime.sleep(1)\n{line}\n")
    with pytest.raises(MachineError) as failure, TritonServer(broken, ServerChoices(ports=Ports.free())):
        pass
    assert f"the process of model postprocessing {telling}" in failure.value.message


@pytest.mark.parametrize("host", ["::1", "localhost", "0.0.0.0", "::"])
def test_a_server_is_started_and_asked_at_any_address_of_this_machine_past_any_proxy(
    repository, host, monkeypatch
) -> None:
    from nvlm_deploy.triton.server import Ports, ServerChoices, TritonServer

    for variable in ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    ask = [sys.executable, "-c", "from nvlm_deploy.cli.main import run; run()", "ask", "hello", "--max-tokens", "2"]
    with TritonServer(repository, ServerChoices(ports=replace(Ports.free(), host=host))) as server:
        asked = subprocess.run([*ask, "--url", server.grpc_url, "--json"], capture_output=True, timeout=120)
    assert asked.returncode == 0, asked.stderr
    assert json.loads(asked.stdout)["num_output_tokens"] >= 1


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["killed", "ctrl-c"])
def test_no_process_survives_the_end_of_the_starter(repository, tmp_path, how) -> None:
    script = tmp_path / "start.py"
    script.write_text(
        "import sys, time\n"
        f"sys.path[:0] = {[entry for entry in sys.path if entry]!r}\n"
        "from pathlib import Path\n"
        "from nvlm_deploy.triton.server import Ports, ServerChoices, TritonServer\n"
        f"with TritonServer(Path({str(repository)!r}), ServerChoices(ports=Ports.free())) as server:\n"
        "    print(server.process_id, flush=True)\n"
        "    time.sleep(600)\n"
    )
    starter = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    server_process = psutil.Process(int(starter.stdout.readline()))
    family = [server_process, *server_process.children(recursive=True)]
    starter.send_signal(how)
    starter.wait()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive


def test_no_config_holds_a_path(repository) -> None:
    for config in repository.glob("*/config.pbtxt"):
        assert "/" not in config.read_text()


def test_a_moved_repository_is_served_from_a_path_with_spaces_and_accents(repository, tmp_path) -> None:
    from nvlm_deploy.triton.server import Ports, ServerChoices, TritonServer

    moved = tmp_path / "my models" / "Ünïcode"
    shutil.copytree(repository, moved)
    with TritonServer(moved, ServerChoices(ports=Ports.free(), ready_timeout_s=120)) as server:
        assert server.grpc_url


def test_pictures_may_be_jpeg_png_or_webp(caller, picture) -> None:
    for kind in ("JPEG", "PNG", "WEBP"):
        assert caller.ask(QUESTION, image=[picture(kind=kind)], max_tokens=2).error is None


def test_a_png_header_is_what_it_claims() -> None:
    from PIL import Image

    assert Image.open(io.BytesIO(png_header(30, 20))).size == (30, 20)


def test_a_server_whose_stub_dies_is_noticed(repository) -> None:
    """Triton itself goes on saying that it is ready."""
    from nvlm_deploy.triton.server import Ports, ServerChoices, TritonServer

    with TritonServer(repository, ServerChoices(ports=Ports.free())) as server:
        stub = psutil.Process(server.process_id).children()[0]
        model = Path(stub.cmdline()[1]).parent.parent.name
        stub.kill()
        assert server.wait().startswith(f"the process of model {model} was killed by signal 9 (SIGKILL")
        assert server.log_ending() == ""
