"""How TensorRT-LLM's engines are served: the command of Triton's launch script, and a fake mpirun that runs it."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nvlm_deploy.errors import MachineError, NvlmError
from nvlm_deploy.triton import engine_launch, server
from nvlm_deploy.triton.engine_fit import EngineFacts
from nvlm_deploy.triton.engine_launch import engine_command, require_engine_server
from nvlm_deploy.triton.server import Ports, ServerChoices, TritonServer, server_arguments


def facts(world_size: int) -> EngineFacts:
    return EngineFacts(
        Path("tensorrt_llm/1"), "1.2.1", world_size, "bfloat16", "float32", 512, 256, 4, 512, 4 * 100, True
    )


def command_of(world_size: int) -> list[str]:
    arguments = server_arguments(Path("/bin/tritonserver"), Path("/repo"), ServerChoices(Ports(1, 2, 3)))
    return engine_command(arguments, facts(world_size), memory_name="prefix")


def ranks_in(command: list[str]) -> list[list[str]]:
    ranks: list[list[str]] = [[]]
    for word in command:
        ranks.append([]) if word == ":" else ranks[-1].append(word)
    return ranks


def test_a_process_for_each_rank_of_which_the_first_has_all_models() -> None:
    """As launch_triton_server.py builds it, but for the colon that it leaves at the end."""
    first, *others = ranks_in(command_of(3))
    assert first[:2] == ["mpirun", "--allow-run-as-root"]
    for rank, words in enumerate([first[2:], *others]):
        assert words[:4] == ["-n", "1", "/bin/tritonserver", "--model-repository=/repo"]
        assert {"--grpc-port=1", "--http-port=2", "--metrics-port=3", "--disable-auto-complete-config"} <= set(words)
        assert f"--backend-config=python,shm-region-prefix-name=prefix{rank}_" in words
        only_decoder = {"--model-control-mode=explicit", "--load-model=tensorrt_llm"}
        assert only_decoder <= set(words) if rank else only_decoder.isdisjoint(words)
    assert len(others) == 2


def test_embeddings_have_a_pool_on_the_first_gpu_that_holds_two_requests() -> None:
    """100 rows a request, 256 values of two bytes."""
    first, second = ranks_in(command_of(2))
    assert f"--cuda-memory-pool-byte-size=0:{2 * 100 * 256 * 2}" in first
    assert not [word for word in second if "pool" in word]


def test_one_rank_needs_no_mpirun() -> None:
    command = command_of(1)
    assert command[0] == "/bin/tritonserver"
    assert ":" not in command


FAKE_SERVER = """
import http.server, json, os, sys
options = dict(word.lstrip("-").split("=", 1) for word in sys.argv[1:] if "=" in word)
rank = 1 if "load-model" in options else 0
path = os.path.join({folder!r}, f"rank{{rank}}.json")
with open(path + ".new", "w") as file:
    json.dump({{"cwd": os.getcwd(), "options": options, "process": os.getpid()}}, file)
os.rename(path + ".new", path)
if rank:
    import time; time.sleep(600)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self): self.send_response(200); self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(options["http-port"])), Handler).serve_forever()
"""
FAKE_MPIRUN = """
import subprocess, sys
groups, words = [], sys.argv[2:]
while words:
    end = words.index(":") if ":" in words else len(words)
    groups.append(subprocess.Popen(words[2:end])); words = words[end + 1:]
for group in groups: group.wait()
"""


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """tritonserver and mpirun on PATH; what the first was told is written down."""
    folder = tmp_path / "container"
    folder.mkdir()
    for name, body in (("tritonserver", FAKE_SERVER.format(folder=str(folder))), ("mpirun", FAKE_MPIRUN)):
        (folder / name).write_text(f"#!{sys.executable}\n{body}")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(folder), os.environ["PATH"]]))
    monkeypatch.setattr(engine_launch, "CONTAINERS_SERVER", folder / "nowhere")
    return folder


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two ranks' engines, by what is read of them."""
    monkeypatch.setattr(server, "read_repository", lambda folder: ())
    monkeypatch.setattr(server, "engine_facts", lambda folder, configs: facts(2))
    folder = tmp_path / "my repository"
    folder.mkdir()
    return folder


def told_to(path: Path) -> dict[str, Any]:
    """What a rank was told, when it has come so far: readiness is the first one's alone."""
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    told: dict[str, Any] = json.loads(path.read_text())
    return told


@pytest.mark.needs("serve")
def test_all_ranks_run_in_the_repositorys_folder_and_end_with_the_server(container: Path, repository: Path) -> None:
    with TritonServer(repository, ServerChoices(Ports.free(), ready_timeout_s=30)) as running:
        told = [told_to(container / f"rank{rank}.json") for rank in range(2)]
        assert [Path(one["cwd"]).resolve() for one in told] == [repository.resolve()] * 2
        names = {one["options"]["backend-config"].removeprefix("python,shm-region-prefix-name=") for one in told}
        assert names == {f"{running.memory_name}{rank}_" for rank in range(2)}
    assert not [one for one in told if Path("/proc", str(one["process"])).exists()]


@pytest.mark.parametrize(("missing", "words"), [("tritonserver", "no tritonserver here"), ("mpirun", "2 ranks are")])
def test_what_the_container_would_have_is_named(
    container: Path, missing: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(container))
    (container / missing).unlink()
    with pytest.raises(MachineError, match=words) as refusal:
        require_engine_server(facts(2))
    assert "-trtllm-python-py3" in (refusal.value.hint or "")


@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("build_config", "max_batch_size", 0, "max_batch_size is 0, expected a whole number"),
        ("build_config", "max_seq_len", float("inf"), "max_seq_len is inf, expected a whole number"),
        ("pretrained_config", "vocab_size", True, "vocab_size is True, expected a whole number"),
        (
            "pretrained_config",
            "mapping",
            {"world_size": 3_000_000},
            "world_size is 3000000, expected a whole",
        ),
        ("pretrained_config", "mapping", {}, "no 'world_size'"),
        ("pretrained_config", "mapping", [], "list indices"),
    ],
)
def test_numbers_that_no_engine_has_are_refused_by_name(tmp_path, section, key, value, said) -> None:
    document = {
        "version": "1.2.1",
        "pretrained_config": {
            "mapping": {"world_size": 2},
            "dtype": "bfloat16",
            "logits_dtype": "float32",
            "vocab_size": 512,
            "hidden_size": 256,
        },
        "build_config": {
            "max_batch_size": 4,
            "max_seq_len": 64,
            "max_prompt_embedding_table_size": 128,
            "plugin_config": {"use_paged_context_fmha": True},
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(document))
    assert EngineFacts.read(tmp_path).world_size == 2
    document[section][key] = value
    (tmp_path / "config.json").write_text(json.dumps(document))
    with pytest.raises(NvlmError) as refusal:
        EngineFacts.read(tmp_path)
    assert said in refusal.value.message
