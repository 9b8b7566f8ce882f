"""The commands that `nvlm serve --dry-run` prints: pasted they serve; in a container they name none of our paths."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest

from nvlm_deploy.triton.launch_commands import launch_commands
from nvlm_deploy.triton.server import Ports, ServerChoices, kill_group


def is_ready(ports: Ports) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{ports.http}/v2/health/ready", timeout=1) as answer:
            return answer.status == 200
    except OSError:
        return False


@pytest.mark.slow
def test_the_bundled_servers_commands_serve_when_they_are_pasted_twice(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = set(Path("/dev/shm").iterdir())
    for _ in range(2):
        ports = Ports.free()
        commands = launch_commands(repository, ServerChoices(ports))
        assert commands.start is None
        log = tmp_path / "log"
        with log.open("wb") as file:
            script = "\n".join(commands.lines)
            shell = subprocess.Popen(
                ["/bin/sh", "-e", "-c", script], stdout=file, stderr=file, cwd="/", start_new_session=True
            )
        try:
            deadline = time.monotonic() + 120
            while not is_ready(ports):
                assert shell.poll() is None, log.read_text()
                assert time.monotonic() < deadline
                time.sleep(0.2)
        finally:
            os.killpg(shell.pid, signal.SIGTERM)
            shell.wait(30)
            kill_group(shell)
            for left in set(Path("/dev/shm").iterdir()) - before:
                if left.name.startswith("nvlm_pasted_"):
                    left.unlink(missing_ok=True)


def test_a_container_is_entered_with_the_repository_mounted_and_no_path_of_ours(tmp_path: Path) -> None:
    engines = tmp_path / "my repository" / "tensorrt_llm" / "1"
    engines.mkdir(parents=True)
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
    (engines / "config.json").write_text(json.dumps(document))
    for rank in range(2):
        (engines / f"rank{rank}.engine").write_bytes(b"engine")
    commands = launch_commands(tmp_path / "my repository", ServerChoices(Ports(1, 2, 3, "0.0.0.0")))
    words = shlex.split(commands.start or "")
    assert f"{tmp_path}/my repository:/repository:ro" in words
    assert words[words.index("--network") + 1] == "host"
    assert words[-2:] == [commands.image, "bash"]
    *_, folder, server = [shlex.split(line) for line in commands.lines]
    assert folder == ["cd", "/repository"]
    assert server.count("--model-repository=/repository") == 2
    assert {"--grpc-port=1", "--http-port=2", "--grpc-address=0.0.0.0"} <= set(server)
    assert not [line for line in commands.lines if str(tmp_path) in line]
