"""`nvlm doctor` on the command line: on recorded machines (machine/README.md), in a fake container and in none."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from nvlm_deploy.checkpoint.trtllm import checkpoint_writer
from nvlm_deploy.checkpoint.trtllm_layout import Layout, Parallelism
from nvlm_deploy.cli import main
from nvlm_deploy.doctor import host
from nvlm_deploy.errors import MachineError
from nvlm_deploy.fingerprint import built_here
from nvlm_deploy.llm import preflight as preflight_module
from nvlm_deploy.machine.resources import Gpu
from nvlm_deploy.model.spec import DecoderSpec
from nvlm_deploy.profile import load_profile
from nvlm_deploy.triton.server import Ports

TESTS = Path(__file__).parents[1]
for fakes in (TESTS / "llm" / "fakes", TESTS / "machine"):
    if str(fakes) not in sys.path:
        sys.path.insert(0, str(fakes))

from built import Workspace  # noqa: E402
from fake_container import FakeContainer  # noqa: E402
from fake_nvidia_smi import FakeNvidiaSmi, install, row  # noqa: E402


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeContainer:
    monkeypatch.setattr(preflight_module, "visible_gpus", lambda: (Gpu("NVIDIA H200", "9.0", "0"),))
    folder = tmp_path / "container"
    folder.mkdir()
    return FakeContainer(folder, monkeypatch)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    import torch

    layout = Layout(DecoderSpec(13, 16, 24, 2, 4, 2, 1e-6, 1e6, 64), None, Parallelism(2))
    (tmp_path / "decoder").mkdir()
    with checkpoint_writer(tmp_path / "decoder", layout) as writer:
        for tensor in layout.tensors:
            writer.put(tensor, torch.zeros(tensor.shape, dtype=torch.bfloat16))
    return tmp_path / "decoder"


def exit_code_of(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as exit_:
        main.run([str(argument) for argument in arguments])
    return int(exit_.value.code or 0)


def test_a_right_container_has_a_line_for_each_finding_and_exit_code_0(container, capsys):
    assert exit_code_of("doctor", "--container") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "engines can be built here"
    assert all(line.startswith(("ok  ", "    ")) for line in lines[:-1])
    assert not any("fix:" in line for line in lines)
    assert "ok  flags: " in "\n".join(lines)


def test_a_wrong_container_has_a_fix_for_each_finding_and_exit_code_1(container, capsys):
    container.tensorrt("11.4.0.106")
    assert exit_code_of("doctor", "--container") == 1
    lines = capsys.readouterr().out.splitlines()
    index = lines.index("NO  import tensorrt: tensorrt 11.4.0.106, expected 10.14.x")
    assert lines[index + 1].startswith("    fix: ")
    assert lines[-1].endswith("things looked at, 1 wrong")


def test_outside_a_container_the_answer_is_no_and_says_which(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert exit_code_of("doctor", "--container") == 1
    shown = capsys.readouterr().out
    assert "NO  trtllm-build: no trtllm-build on PATH" in shown
    assert "26.07" in shown


@pytest.mark.parametrize(("version", "code"), [("1.2.1", 0), ("0.17.0", 1)])
def test_as_json_it_is_one_document_also_when_the_answer_is_no(container, capsys, version, code):
    container.version(version)
    if code:
        container.tensorrt("10.8.0.43")
    assert exit_code_of("doctor", "--container", "--json") == code
    document = json.loads(capsys.readouterr().out)
    assert document["passed"] is (code == 0)
    assert all(finding["passed"] or finding["fix"] for finding in document["findings"])


@pytest.mark.needs("build")
def test_a_checkpoint_of_ones_own_is_what_is_asked_about(container, checkpoint, capsys):
    assert exit_code_of("doctor", "--container", "--checkpoint", checkpoint, "--json") == 0
    checks = [finding["check"] for finding in json.loads(capsys.readouterr().out)["findings"]]
    assert [check for check in checks if check.startswith("tensors")] == [
        f"tensors {checkpoint} rank {rank}" for rank in range(2)
    ]


def test_a_checkpoint_that_is_none_is_wrong_input(container, tmp_path, capsys):
    assert exit_code_of("doctor", "--container", "--checkpoint", tmp_path / "none") == 2
    assert "no TensorRT-LLM checkpoint" in capsys.readouterr().err


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeNvidiaSmi:
    return FakeNvidiaSmi(tmp_path / "nvidia", monkeypatch)


@pytest.fixture
def free_ports() -> list[str]:
    ports = Ports.free()
    return ["--grpc-port", str(ports.grpc), "--http-port", str(ports.http), "--metrics-port", str(ports.metrics)]


def gpu_profile(folder: Path, sku: str = "h100-sxm-80gb", *, tensor_parallel: int = 2) -> Path:
    """A profile file; TensorRT for the encoder, TensorRT-LLM for the decoder."""
    path = folder / f"{sku}.toml"
    path.write_text(
        f"""description = "test"
sku = "{sku}"
[vision]
runtime = "tensorrt"
precision = "bf16"
[decoder]
runtime = "tensorrt_llm"
quantization = "fp8"
tensor_parallel = {tensor_parallel}
max_batch_size = 4
max_seq_len = 8192
[calibration]
samples = 64
[serving]
max_images = 1
"""
    )
    return path


def findings_of(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, dict[str, Any]]:
    code = exit_code_of("doctor", "--json", *arguments)
    document = json.loads(capsys.readouterr().out)
    assert document["passed"] is (code == 0)
    assert all(finding["passed"] or finding["fix"] for finding in document["findings"])
    return {finding["check"]: finding for finding in document["findings"]}


def test_this_machine_is_looked_at_without_any_question(capsys, free_ports) -> None:
    found = findings_of(capsys, *free_ports)
    assert {"driver", "Python", "libpython", "glibc", "tritonserver", "ports", "shared memory", "disk"} <= found.keys()


def test_one_line_for_each_finding_one_for_each_fix_and_one_for_all(capsys, smi, tmp_path, free_ports) -> None:
    smi.machine("H200", "H200")
    assert exit_code_of("doctor", "--profile", gpu_profile(tmp_path), *free_ports) == 1
    lines = capsys.readouterr().out.splitlines()
    index = next(number for number, line in enumerate(lines) if line.startswith("NO  GPU: "))
    assert "2 x h100-sxm-80gb needed" in lines[index]
    assert lines[index + 1].startswith("    fix: ")
    assert lines[-2].endswith(" wrong")
    assert lines[-1] == "profiles for this machine: cpu, cpu-bf16, h200-141gb-throughput"


def test_a_machine_with_what_the_profile_needs_has_its_gpu_findings_right(capsys, smi, tmp_path) -> None:
    smi.machine("H100", "H100")
    found = findings_of(capsys, "--profile", gpu_profile(tmp_path))
    for check in ("driver", "GPU", "CUDA", "MIG", "GPU in use", "GPU memory", "NVLink"):
        assert found[check]["passed"], found[check]
    assert "tokens of KV cache" in found["GPU memory"]["found"]
    assert "NV18" in found["NVLink"]["found"]


@pytest.mark.parametrize(
    ("machine", "check", "words"),
    [
        ({"kinds": []}, "GPU", "none visible"),
        ({"kinds": ["H100"]}, "GPU", "2 x h100-sxm-80gb needed"),
        ({"kinds": ["A100", "A100"]}, "GPU", "a100-80gb"),
        ({"kinds": ["H100", "H100"], "driver": "535.183.06"}, "driver", "at least 580"),
        ({"kinds": ["H100", "H100"], "connection": "SYS"}, "NVLink", "does not join GPU 0 and 1 (SYS)"),
        ({"kinds": ["H100", "H200"]}, "GPU", "1 x NVIDIA H200 (h200-141gb); 2 x h100-sxm-80gb needed"),
        ({"kinds": ["H100", "H100"], "used": 60000}, "GPU in use", "GPU 0 58.6 GiB"),
        ({"kinds": ["H100", "H100"], "used": 60000}, "GPU memory", "needs "),
    ],
)
def test_what_is_wrong_with_the_gpus_is_named(capsys, smi, tmp_path, machine, check, words) -> None:
    smi.machine(*machine.pop("kinds"), **machine)
    found = findings_of(capsys, "--profile", gpu_profile(tmp_path))
    assert not found[check]["passed"]
    assert words in found[check]["found"]


def test_the_right_gpus_behind_wrong_ones_are_named_for_cuda_visible_devices(capsys, smi, tmp_path) -> None:
    smi.machine("A100", "H100", "H100")
    found = findings_of(capsys, "--profile", gpu_profile(tmp_path))
    assert found["GPU"]["fix"] == "`export CUDA_VISIBLE_DEVICES=1,2`"


def test_a_divided_gpu_has_the_command_that_joins_it(capsys, smi, tmp_path) -> None:
    smi.rows([row(0, "H100", mig="Enabled"), row(1, "H100")])
    found = findings_of(capsys, "--profile", gpu_profile(tmp_path))
    assert found["MIG"]["found"] == "enabled on GPU 0"
    assert "nvidia-smi -i 0 -mig 0" in found["MIG"]["fix"]


def test_a_model_too_large_for_one_gpu_says_how_much_is_missing(capsys, smi, tmp_path) -> None:
    smi.machine("H100")
    found = findings_of(capsys, "--profile", gpu_profile(tmp_path, tensor_parallel=1))
    assert "79.2 visible" in found["GPU memory"]["found"]


@pytest.mark.parametrize(("code", "words"), [(9, "NVIDIA-SMI has failed because it couldn't communicate"), (12, "")])
def test_a_driver_that_does_not_answer_is_wrong_for_a_gpu_and_right_for_none(
    capsys, smi, tmp_path, free_ports, code, words
) -> None:
    smi.fails(code, words)
    found = findings_of(capsys, "--profile", gpu_profile(tmp_path))
    assert f"nvidia-smi ended with {code}" in found["driver"]["found"]
    assert findings_of(capsys, "--profile", "cpu", *free_ports)["driver"]["passed"]


@pytest.mark.parametrize("answer", [b"0, garbage", b"\xff\xfe", b"\0", row(0, "H100").replace("81559", "²").encode()])
@pytest.mark.parametrize("asked", [True, False])
def test_an_answer_that_nobody_knows_is_a_finding_not_a_traceback(capsys, smi, tmp_path, answer, asked) -> None:
    smi.says_bytes(answer)
    driver = findings_of(capsys, *(["--profile", gpu_profile(tmp_path)] if asked else []))["driver"]
    assert not driver["passed"]
    assert "nvidia-smi answers" in driver["found"]


def test_a_driver_that_is_there_and_fails_is_wrong_even_when_nothing_is_asked(capsys, smi) -> None:
    smi.fails(9, "NVIDIA-SMI has failed because it couldn't communicate")
    assert not findings_of(capsys)["driver"]["passed"]


def test_no_driver_is_right_where_nothing_is_asked_and_wrong_for_a_gpu(
    capsys, smi, tmp_path, monkeypatch, free_ports
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    smi.cuda_shows()
    assert findings_of(capsys, *free_ports)["driver"]["passed"]
    driver = findings_of(capsys, "--profile", gpu_profile(tmp_path))["driver"]
    assert "no nvidia-smi on PATH" in driver["found"]
    assert "install NVIDIA's driver" in driver["fix"]
    smi.cuda_shows("H100", "H100")
    driver = findings_of(capsys)["driver"]
    assert driver["found"].endswith("CUDA shows 2 x NVIDIA H100 80GB HBM3")
    assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility" in driver["fix"]


@pytest.mark.parametrize(
    ("nvidia_smi", "cuda", "fix"),
    [
        (["H100", "H100"], [], "NVIDIA_DRIVER_CAPABILITIES"),
        (["H100", "H100"], ["H100"], "nvidia-fabricmanager"),
        (["A100", "H100"], ["H100", "A100"], "CUDA_DEVICE_ORDER=PCI_BUS_ID"),
    ],
)
def test_when_cuda_and_nvidia_smi_disagree_it_is_said(capsys, smi, nvidia_smi, cuda, fix) -> None:
    smi.machine(*nvidia_smi)
    assert findings_of(capsys)["CUDA"]["passed"]
    smi.cuda_shows(*cuda)
    found = findings_of(capsys)["CUDA"]
    assert not found["passed"]
    assert fix in found["fix"]


@pytest.mark.parametrize(
    ("memory", "words"),
    [
        ("81559, [N/A]", "GPU 0 not said of 79.6 GiB"),
        ("[N/A], 4", "GPU 0 0.0 GiB of not said"),
        ("[Unknown Error], [Unknown Error]", "GPU 0 not said of not said"),
        ("81559, 90000", "GPU 0 87.9 GiB of 79.6 GiB"),
    ],
)
def test_a_memory_that_nobody_can_know_is_unknown_and_never_ok(capsys, smi, tmp_path, memory, words) -> None:
    smi.rows([row(0, "H100").replace("81559, 4", memory), row(1, "H100")])
    found = findings_of(capsys, "--profile", gpu_profile(tmp_path))
    for check in ("GPU in use", "GPU memory"):
        assert not found[check]["passed"]
        assert found[check]["found"] == f"unknown: {words}"
        assert "`nvidia-smi --query-gpu=index,memory.total,memory.used --format=csv`" in found[check]["fix"]


def test_without_a_gpu_nothing_is_said_of_what_gpus_have(capsys, smi, tmp_path) -> None:
    smi.machine()
    for found in (findings_of(capsys), findings_of(capsys, "--profile", gpu_profile(tmp_path))):
        assert found["GPU"]["found"].startswith("none visible")
        assert not {"MIG", "GPU in use", "GPU memory", "NVLink", "CUDA"} & found.keys()


@pytest.mark.parametrize("connection", ["", "?"])
def test_how_gpus_are_joined_is_unknown_where_the_table_does_not_say_it(capsys, smi, tmp_path, connection) -> None:
    smi.rows([row(0, "H100"), row(1, "H100")])
    told = json.loads(smi.told.read_text())
    smi.told.write_text(json.dumps({**told, "topology": connection}))
    nvlink = findings_of(capsys, "--profile", gpu_profile(tmp_path))["NVLink"]
    assert nvlink["found"] == "unknown between GPU 0 and 1"
    assert "`nvidia-smi topo -m`: NV# must stand" in nvlink["fix"]
    assert "`nvidia-smi nvlink --status`" in nvlink["fix"]


@pytest.mark.parametrize(
    "rows", [[row(0, "H100")], [row(0, "L40S"), row(1, "L40S")], [row(n, "H100", mig="Enabled") for n in range(2)]]
)
def test_of_gpus_that_cannot_be_used_neither_memory_nor_nvlink_is_said(capsys, smi, tmp_path, rows) -> None:
    smi.rows(rows, connection="SYS")
    found = findings_of(capsys, "--profile", gpu_profile(tmp_path))
    assert not (found["GPU"]["passed"] and found["MIG"]["passed"])
    assert not {"GPU memory", "NVLink"} & found.keys()


def test_a_build_needs_what_nvlm_plan_says_of_memory_and_disk(capsys, smi, tmp_path, monkeypatch) -> None:
    from nvlm_deploy.planning.build_steps import most_disk_bytes
    from nvlm_deploy.planning.known_models import DEFAULT_SPEC, planned_model
    from nvlm_deploy.planning.plan import make_plan

    steps = make_plan(planned_model(None, DEFAULT_SPEC), load_profile(str(gpu_profile(tmp_path))), 0).steps
    largest = max(steps, key=lambda step: step.host_bytes)
    for least, passed in ((0, True), (-1, False)):
        monkeypatch.setattr(host, "available_memory", lambda least=least: largest.host_bytes + least)
        monkeypatch.setattr(host, "free_bytes", lambda _, least=least: most_disk_bytes(steps) + least)
        found = findings_of(capsys, "--profile", gpu_profile(tmp_path))
        assert found["host memory"]["passed"] is found["disk"]["passed"] is passed
    assert f"({largest.name}, derived)" in found["host memory"]["found"]
    assert f"`nvlm {largest.name}`" in found["host memory"]["fix"]


def test_the_same_fix_is_said_once(capsys, smi, tmp_path) -> None:
    smi.machine("H100", "H100")
    exit_code_of("doctor", "--profile", gpu_profile(tmp_path))
    shown = capsys.readouterr().out
    assert shown.count("26.07") == 1
    assert shown.count("    fix: the same as for tritonserver") == 3


def test_a_profile_that_cannot_be_is_wrong_input_with_what_can(capsys, smi, tmp_path) -> None:
    assert exit_code_of("doctor", "--profile", gpu_profile(tmp_path, tensor_parallel=3)) == 2
    assert "legal" in " ".join(capsys.readouterr().err.split())


def test_gpus_that_are_hidden_are_thought_of(capsys, smi, tmp_path, monkeypatch) -> None:
    smi.machine("H100", "H100")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    smi.cuda_shows("H100")
    assert "`unset CUDA_VISIBLE_DEVICES`" in findings_of(capsys, "--profile", gpu_profile(tmp_path))["GPU"]["fix"]


@pytest.mark.parametrize("columns", [40, 80])
def test_findings_are_as_wide_as_the_terminal_and_commands_are_in_one_piece(
    capsys, smi, tmp_path, monkeypatch, columns
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    smi.rows([row(0, "H100", mig="Enabled", used=60000, driver="535.1"), row(1, "A100")], connection="SYS")
    assert exit_code_of("doctor", "--profile", gpu_profile(tmp_path)) == 1
    lines = capsys.readouterr().out.splitlines()
    assert not [line for line in lines if len(line) > columns and " " in line.strip() and "`" not in line]
    assert any("`nvidia-smi -i 0 -mig 0`" in line for line in lines)
    verdict = next(number for number, line in enumerate(lines) if "things looked at" in line)
    starts = [line[:4] for line in lines[:verdict]]
    assert set(starts) == {"ok  ", "NO  ", "    "}
    assert starts.count("NO  ") == sum(line.startswith("    fix: ") for line in lines)


def test_outside_a_container_the_versions_say_which_containers_have_them(capsys, smi, tmp_path) -> None:
    smi.machine("H100", "H100")
    found = findings_of(capsys, "--profile", gpu_profile(tmp_path))
    assert "26.07" in found["cohort"]["fix"]
    assert "26.07" in found["tensorrt_llm"]["fix"]


def test_too_little_disk_and_shared_memory_are_named(capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(host, "free_bytes", lambda _folder: 32 << 20)
    found = findings_of(capsys, "--profile", gpu_profile(tmp_path), "--workspace", tmp_path)
    assert found["disk"]["found"].endswith("needed to build (derived)")
    assert "--shm-size=" in found["shared memory"]["fix"]


def test_a_port_in_use_is_named(capsys) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        found = findings_of(capsys, "--grpc-port", str(taken.getsockname()[1]))
    assert "gRPC port" in found["ports"]["found"]
    assert "ss -ltnp" in found["ports"]["fix"]


@pytest.mark.needs("serve")
def test_missing_libpython_old_glibc_and_another_python_have_their_fixes(capsys, monkeypatch) -> None:
    def none(version: str) -> Path:
        raise MachineError(f"no libpython{version}.so.1.0 found", hint=f"apt-get install libpython{version}")

    monkeypatch.setattr(host, "libpython_folder", none)
    monkeypatch.setattr(host, "glibc_version", lambda: (2, 31))
    monkeypatch.setattr(host, "python_version", lambda: "3.10")
    found = findings_of(capsys)
    assert found["libpython"]["fix"] == "apt-get install libpython3.10"
    assert found["glibc"]["found"] == "2.31, the bundled tritonserver needs 2.35"
    assert "3.11" in found["Python"]["fix"]


def test_a_repository_is_asked_about_by_what_it_was_built_with(
    capsys, smi, tmp_path, tiny_spec, tokenizer_file, free_ports, monkeypatch
) -> None:
    install(tmp_path / "site", monkeypatch, tensorrt="10.14.1.48", tensorrt_llm="1.2.1")
    workspace = Workspace(tmp_path / "work", load_profile("cpu"), tiny_spec, tokenizer_file)
    workspace.build()
    found = findings_of(capsys, "--repository", workspace.repository, *free_ports)
    assert "the largest request" in found["shared memory"]["found"]
    assert found["host memory"]["passed"]
    profile = load_profile(str(gpu_profile(tmp_path, tensor_parallel=1)))
    bound = Workspace(tmp_path / "gpu", profile, tiny_spec, tokenizer_file)
    bound.build(built_here("tensorrt", compute_capability="9.0"))
    assert findings_of(capsys, "--repository", bound.repository)["engine of build-vision"]["passed"]
    smi.machine("H100", driver="590.48.01")
    engine = findings_of(capsys, "--repository", bound.repository)["engine of build-vision"]
    assert engine["found"] == "driver: built with 580.95.05, here 590.48.01"
    assert engine["fix"] == "install driver 580.95.05, or build again with this one"
    smi.fails(9, "NVIDIA-SMI has failed")
    assert not findings_of(capsys, "--repository", bound.repository)["driver"]["passed"]


def test_a_repository_with_another_spec_than_was_built_is_wrong_input(
    capsys, tmp_path, tiny_spec, tokenizer_file
) -> None:
    workspace = Workspace(tmp_path / "work", load_profile("cpu"), tiny_spec, tokenizer_file)
    workspace.build()
    (spec,) = workspace.repository.glob("*/*/model_spec.json")
    spec.write_bytes(spec.read_bytes().replace(b"4", b"\xff", 1))
    assert exit_code_of("doctor", "--repository", workspace.repository) == 2
    assert "model_spec.json is not what was built" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("host", ["a..b", "no.such.host.invalid", "::zz"])
def test_an_address_that_is_none_is_a_finding(capsys, host, free_ports) -> None:
    assert "cannot be used" in findings_of(capsys, "--host", host, *free_ports)["ports"]["found"]


def test_the_same_port_for_two_things_is_a_finding(capsys) -> None:
    found = findings_of(capsys, "--grpc-port", "18001", "--http-port", "18001")["ports"]
    assert "need three ports" in found["found"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--profile", "none-such"),
        ("--repository", "none-such"),
        ("--profile", "cpu", "--container"),
        ("--checkpoint", "folder"),
    ],
)
def test_questions_that_cannot_be_answered_are_wrong_input(capsys, arguments) -> None:
    assert exit_code_of("doctor", *arguments, "--json") == 2
    assert json.loads(capsys.readouterr().out)["error"]["message"]


def test_a_profile_without_gpus_asks_nothing_of_those_that_are_here(capsys, smi) -> None:
    smi.machine("H100", driver="470.1")
    found = findings_of(capsys, "--profile", "cpu")
    assert found["driver"] == {
        "check": "driver",
        "passed": True,
        "found": "nvidia-smi answers; profile cpu needs no GPU",
        "fix": None,
    }
    assert not {"GPU", "MIG", "GPU memory"} & found.keys()


def test_a_workspace_that_cannot_be_written_to_is_a_finding(capsys, smi, tmp_path, monkeypatch) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    found = findings_of(capsys, "--profile", "cpu", "--workspace", in_the_way / "below")
    assert (found["disk"]["passed"], "Not a directory" in found["disk"]["found"]) == (False, True)
    found = findings_of(capsys, "--profile", "cpu", "--workspace", tmp_path / "new")
    assert found["disk"]["passed"]
    may = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK and may(path, mode))
    found = findings_of(capsys, "--profile", "cpu", "--workspace", tmp_path)
    assert (found["disk"]["passed"], "Permission denied" in found["disk"]["found"]) == (False, True)
