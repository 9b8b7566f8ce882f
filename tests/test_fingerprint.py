"""An engine of another GPU, driver, TensorRT or cohort is refused before Triton starts, and what would run is named.

The machines are recorded answers of nvidia-smi and recorded distributions (machine/README.md).
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nvlm_deploy.artifacts import digests, write_manifest
from nvlm_deploy.errors import MachineError, NvlmError, RejectedError
from nvlm_deploy.fingerprint import (
    Fingerprint,
    built_here,
    cohort_versions,
    fingerprints_of,
    mismatches,
    profiles_for,
    require_fitting,
    require_fitting_repository,
)
from nvlm_deploy.machine.nvidia_smi import connections_of, gpus_here, gpus_of, visible
from nvlm_deploy.manifest import read_manifest
from nvlm_deploy.profile import load_profile
from nvlm_deploy.triton.servable import remove_caches, require_servable

MACHINE = Path(__file__).parent / "machine"
if str(MACHINE) not in sys.path:
    sys.path.insert(0, str(MACHINE))

from built import Workspace  # noqa: E402
from fake_nvidia_smi import DRIVER, FakeNvidiaSmi, install, row, topology  # noqa: E402

COHORT = "TensorRT 10.14.1.48, TensorRT-LLM 1.2.1"
RECORDED = Fingerprint(
    runtime="tensorrt",
    compute_capability="9.0",
    tensorrt="10.14.1.48",
    cohort=COHORT,
    gpu="NVIDIA H100 80GB HBM3",
    mig=False,
    driver=DRIVER,
)


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeNvidiaSmi:
    """A machine with one H100 in the cohort of TensorRT-LLM 1.2.1."""
    install(tmp_path / "site", monkeypatch, tensorrt="10.14.1.48", tensorrt_llm="1.2.1")
    return FakeNvidiaSmi(tmp_path / "bin", monkeypatch)


@pytest.fixture
def workspace(tmp_path: Path, tiny_spec, tokenizer_file) -> Workspace:
    return Workspace(tmp_path / "work", load_profile("cpu"), tiny_spec, tokenizer_file)


def found() -> list[str]:
    return [str(mismatch) for mismatch in mismatches(RECORDED, gpus_here(os.environ))]


def test_what_is_built_here_fits_here(smi) -> None:
    assert built_here("tensorrt", compute_capability="9.0") == RECORDED
    assert found() == []
    require_fitting({"build-vision": RECORDED}, "repository")


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        ({"kinds": "H200"}, ["GPU: built with NVIDIA H100 80GB HBM3, here NVIDIA H200"]),
        (
            {"kinds": "A100"},
            [
                "GPU: built with NVIDIA H100 80GB HBM3, here NVIDIA A100-SXM4-80GB",
                "compute capability: built with 9.0, here 8.0",
            ],
        ),
        ({"kinds": "H100", "driver": "590.48.01"}, ["driver: built with 580.95.05, here 590.48.01"]),
        ({"kinds": "H100", "driver": "570.124.06"}, ["driver: built with 580.95.05, here 570.124.06"]),
    ],
)
def test_another_gpu_or_driver_is_named(smi, machine, words) -> None:
    smi.machine(machine.pop("kinds"), **machine)
    assert found() == words
    with pytest.raises(NvlmError, match="build-vision: ") as refusal:
        require_fitting({"build-vision": RECORDED}, "repository")
    assert refusal.value.exit_code == 1
    assert "build" in (refusal.value.hint or "")


def test_a_gpu_divided_by_mig_is_another_gpu(smi) -> None:
    smi.rows([row(0, "H100", mig="Enabled")])
    assert found() == ["MIG: built with a whole GPU, here a GPU divided by MIG"]


@pytest.mark.parametrize(
    ("versions", "words"),
    [
        ({"tensorrt": "10.13.3.9"}, "TensorRT: built with 10.14.1.48, here 10.13.3.9"),
        ({"tensorrt_llm": "1.1.0"}, f"cohort: built with {COHORT}, here TensorRT 10.14.1.48, TensorRT-LLM 1.1.0"),
    ],
)
def test_another_tensorrt_or_cohort_is_named_with_the_container_as_mend(
    smi, tmp_path, monkeypatch, versions, words
) -> None:
    install(tmp_path / "site", monkeypatch, **versions)
    assert words in found()
    with pytest.raises(NvlmError) as refusal:
        require_fitting({"build-vision": RECORDED}, "repository")
    assert "serve in the container it was built in" in (refusal.value.hint or "")


@pytest.mark.parametrize("field", ["gpu", "compute_capability", "driver", "tensorrt", "cohort"])
def test_every_field_that_was_recorded_counts(smi, field) -> None:
    other = replace(RECORDED, **{field: "9.9"})
    with pytest.raises(NvlmError, match=r"built with 9\.9, here"):
        require_fitting({"build-llm": other}, "repository")


def test_an_engine_of_two_ranks_needs_two_gpus_and_both_of_its_kind(smi) -> None:
    two = replace(RECORDED, gpus=2)
    with pytest.raises(NvlmError, match="number of GPUs: built with 2, here 1 visible"):
        require_fitting({"build-llm": two}, "repository")
    smi.machine("H100", "H200")
    with pytest.raises(NvlmError, match="here NVIDIA H200"):
        require_fitting({"build-llm": two}, "repository")
    smi.machine("H100", "H100")
    require_fitting({"build-llm": two}, "repository")


def test_a_plan_of_tensorrt_rtx_is_bound_to_a_capability_and_a_version_alone(smi, tmp_path, monkeypatch) -> None:
    install(tmp_path / "site", monkeypatch, tensorrt_rtx="1.7.1.116")
    fingerprint = built_here("tensorrt_rtx", compute_capability="8.9")
    assert fingerprint == Fingerprint("tensorrt_rtx", "8.9", "1.7.1.116", "TensorRT-RTX 1.7.1.116")
    smi.machine("L40S", driver="610.43")
    require_fitting({"build-vision": fingerprint}, "repository")
    smi.machine("H100")
    with pytest.raises(NvlmError, match=r"compute capability: built with 8\.9, here 9\.0"):
        require_fitting({"build-vision": fingerprint}, "repository")


def test_a_runtime_without_engines_is_bound_to_no_machine() -> None:
    assert built_here("onnxruntime", compute_capability=None) is None
    assert built_here("reference", compute_capability="9.0") is None
    require_fitting({}, "repository")


def test_without_a_driver_the_machine_lacks_something_and_the_gpu_wanted_is_said(smi) -> None:
    smi.fails(9, "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.")
    with pytest.raises(MachineError, match="run on NVIDIA H100 80GB HBM3, but nvidia-smi ended with 9"):
        require_fitting({"build-vision": RECORDED}, "repository")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ({"gpus": "1"}, "gpus is '1'"),
        ({"gpus": True}, "gpus is True"),
        ({"gpus": 0}, "gpus is 0: input should be greater than or equal to 1"),
        ({"gpus": -3}, "gpus is -3"),
        ({"driver": 580}, "driver is 580"),
        ({"mig": "no"}, "mig is 'no'"),
        ({"surprise": 1}, "unknown key surprise"),
        ({"cohort": None}, "cohort is None"),
        ({"runtime": "bogus"}, "runtime is 'bogus'"),
        ({"compute_capability": "x"}, "compute_capability is 'x'"),
        ({"gpu": None, "driver": None}, "does not say driver, gpu"),
    ],
)
def test_a_damaged_fingerprint_is_refused_not_ignored(damage, words) -> None:
    with pytest.raises(NvlmError, match="x: ") as refusal:
        Fingerprint.from_json({**RECORDED.as_json(), **damage}, "x")
    assert words in refusal.value.message
    assert "`nvlm build`" in (refusal.value.hint or "")


@pytest.mark.parametrize("value", [[], None, 3, "text", {}, {"runtime": "tensorrt"}])
def test_what_is_no_fingerprint_is_refused(value) -> None:
    with pytest.raises(NvlmError, match="its fingerprint is damaged"):
        Fingerprint.from_json(value, "x")


@pytest.mark.parametrize("name", ["mig", "gpus"])
def test_a_fingerprint_that_leaves_something_out_is_refused(name) -> None:
    lacking = {key: value for key, value in RECORDED.as_json().items() if key != name}
    with pytest.raises(NvlmError, match=f"does not say {name}"):
        Fingerprint.from_json(lacking, "x")


def test_a_repository_says_what_its_engines_are_bound_to_and_the_choices_and_the_list_behind_them(
    smi, workspace
) -> None:
    workspace.build(RECORDED)
    manifest = read_manifest(workspace.repository)
    assert fingerprints_of(manifest, "") == {"build-vision": RECORDED}
    assert manifest.profile == load_profile("cpu").model_dump(mode="json")
    (recorded,) = manifest.calibration
    assert recorded.folder == str(workspace.calibration)
    assert sorted(recorded.files) == ["000.jpg", "samples.jsonl"]
    assert manifest.tools["CUDA driver"] == DRIVER
    assert manifest.tools["tensorrt_llm"] == "1.2.1"
    assert manifest.evidence == "measured"
    assert "CC-BY-NC-4.0" in manifest.licence


def test_the_cohort_is_recorded_also_where_there_is_no_gpu(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("NVIDIA_TRITON_SERVER_VERSION", "26.07")
    versions = cohort_versions()
    assert versions["CUDA driver"] == "absent"
    assert versions["container"] == "26.07"
    assert {"python", "torch", "tensorrt", "tensorrt_llm", "tritonserver", "nvlm-deploy"} <= versions.keys()


def test_serving_on_another_machine_is_refused_and_says_what_would_run(smi, workspace, tiny_spec, tokenizer_file):
    workspace.build(RECORDED)
    require_servable(workspace.repository)
    neighbour = Workspace(workspace.root, load_profile("cpu-bf16"), tiny_spec, tokenizer_file)
    neighbour.build(None)
    smi.machine("H200")
    with pytest.raises(NvlmError, match="GPU: built with NVIDIA H100 80GB HBM3, here NVIDIA H200") as refusal:
        require_servable(workspace.repository)
    assert "repositories beside it that would run here: cpu-bf16" in refusal.value.message
    assert "profiles that would run here: cpu" in refusal.value.message
    assert "26.07" not in (refusal.value.hint or "")
    require_servable(neighbour.repository)


def test_another_cohort_is_refused_with_the_containers_that_there_are(smi, workspace, tmp_path, monkeypatch) -> None:
    workspace.build(RECORDED)
    install(tmp_path / "site", monkeypatch, tensorrt_llm="1.1.0")
    with pytest.raises(
        RejectedError, match=r"cohort: built with .* here TensorRT 10\.14\.1\.48, TensorRT-LLM 1\.1\.0"
    ) as no:
        require_servable(workspace.repository)
    assert "serve in the container it was built in" in (no.value.hint or "")
    assert "26.07 (1.2.1)" in (no.value.hint or "")


def test_every_kind_of_engine_needs_its_own_fingerprint(smi, workspace) -> None:
    workspace.build(RECORDED)
    (workspace.repository / "tensorrt_llm" / "1" / "rank0.engine").write_bytes(b"engine")
    manifest = read_manifest(workspace.repository)
    write_manifest(workspace.repository, replace(manifest, outputs=digests(workspace.repository)))
    with pytest.raises(RejectedError, match=r"does not say what machine rank0\.engine was built on"):
        require_servable(workspace.repository)


def test_without_a_driver_serve_says_so_and_what_would_run(smi, workspace) -> None:
    workspace.build(RECORDED)
    smi.fails(9, "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.")
    with pytest.raises(MachineError, match="couldn't communicate") as refusal:
        require_servable(workspace.repository)
    assert refusal.value.exit_code == 3


def test_profiles_of_no_gpu_run_anywhere(smi) -> None:
    smi.rows([])
    assert {"cpu", "cpu-bf16"} <= set(profiles_for(gpus_here({})))


@pytest.mark.needs("build")
def test_the_serving_model_refuses_a_plan_of_another_machine(smi, workspace, monkeypatch) -> None:
    import torch

    from nvlm_deploy.serving.engine import open_engine

    workspace.build(RECORDED)
    folder = workspace.repository / "vision_encoder" / "1"
    require_fitting_repository(folder)
    smi.machine("H100", driver="590.48.01")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(NvlmError, match=r"driver: built with 580\.95\.05, here 590\.48\.01"):
        open_engine(folder, "tensorrt", threads=1)


def test_the_serving_model_refuses_a_plan_that_does_not_say_its_machine(smi, workspace) -> None:
    workspace.build(RECORDED)
    manifest = read_manifest(workspace.repository)
    write_manifest(workspace.repository, replace(manifest, fingerprints={}))
    with pytest.raises(NvlmError, match=r"does not say what machine vision\.plan was built on"):
        require_servable(workspace.repository)
    with pytest.raises(NvlmError, match="does not say what machine"):
        require_fitting_repository(workspace.repository / "vision_encoder" / "1")


def test_python_s_caches_are_removed_before_a_server_could_run_them(workspace) -> None:
    workspace.build(None)
    cache = workspace.repository / "preprocessing" / "1" / "__pycache__"
    cache.mkdir()
    (cache / "model.cpython-311.pyc").write_bytes(b"code of somebody else")
    remove_caches(workspace.repository)
    assert not cache.exists()


def test_rows_of_nvidia_smi_are_read_with_their_gaps() -> None:
    (gpu,) = gpus_of("0, GPU-1, NVIDIA GB10, 12.1, 580.95.05, [N/A], [N/A], [N/A]\n")
    assert (gpu.name, gpu.compute_capability, gpu.total_bytes, gpu.mig) == ("NVIDIA GB10", "12.1", None, None)
    assert gpu.memory_unknown
    (gpu,) = gpus_of(row(3, "H100", used=70000))
    assert (gpu.index, gpu.total_bytes, gpu.used_bytes, gpu.mig) == (3, 81559 << 20, 70000 << 20, False)


GOOD = row(0, "H100")


@pytest.mark.parametrize(
    "text",
    [
        "garbage",
        "0, GPU-1, NVIDIA X, [N/A], 470.1, 1, 1, [N/A]",
        "a, b, c, 9.0, e, f, g, h",
        GOOD.replace("81559", "²"),
        GOOD.replace("81559", "١"),
        GOOD.replace("81559", "-1"),
        GOOD.replace("81559", "9" * 5000),
        GOOD.replace("0, ", "² , ", 1),
        GOOD.replace("HBM3", "\ufffd"),
        GOOD.replace(DRIVER, "9" * 5000),
        GOOD.replace("Disabled", "[Unknown Error]"),
        GOOD.replace("Disabled", ""),
        GOOD + ", more",
    ],
)
def test_an_answer_that_cannot_be_read_is_the_machines_fault(text) -> None:
    assert gpus_of(GOOD)
    with pytest.raises(MachineError, match="nvidia-smi answers") as refusal:
        gpus_of(text)
    assert len(refusal.value.message) < 400


@pytest.mark.parametrize("answer", [b"\xff\xfe, \x80", b"\0\0\0", b'"', b"0, GPU-\xe9, x, 9.0, 580, 1, 1, Disabled\n"])
def test_bytes_that_are_no_text_are_the_machines_fault_too(smi, answer) -> None:
    smi.says_bytes(answer)
    with pytest.raises(MachineError, match="nvidia-smi answers"):
        gpus_here({})


def test_no_devices_is_no_error(smi) -> None:
    smi.fails(6, "No devices were found")
    assert gpus_here({}).gpus == ()


@pytest.mark.parametrize(
    ("chosen", "indices"),
    [(None, [0, 1, 2]), ("2,0", [2, 0]), ("", []), ("GPU-1", [1]), ("0,-1,2", [0]), ("7", []), ("MIG-x", [2])],
)
def test_cuda_visible_devices_is_honoured_in_its_order(chosen, indices) -> None:
    gpus = gpus_of("\n".join([row(0, "H100"), row(1, "H100"), row(2, "H100", mig="Enabled")]))
    assert [gpu.index for gpu in visible(gpus, chosen)] == indices


def test_connections_are_read_from_the_coloured_table() -> None:
    assert connections_of(topology(3, "NV18")) == {(0, 1): "NV18", (0, 2): "NV18", (1, 2): "NV18"}
    assert connections_of(topology(1, "X")) == {}


def test_a_fingerprint_survives_json() -> None:
    assert Fingerprint.from_json(json.loads(json.dumps(RECORDED.as_json())), "") == RECORDED
