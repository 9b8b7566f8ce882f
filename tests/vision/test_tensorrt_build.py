"""The child's program: versions, GPUs and timing caches, and which names of the builders' API it calls.

Enterprise TensorRT cannot be installed here: what we call of it is checked against names recorded from its bindings.
"""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import pytest

from nvlm_deploy.errors import MachineError, NvlmError
from nvlm_deploy.machine.resources import Gpu
from nvlm_deploy.vision import tensorrt_build
from nvlm_deploy.vision.tensorrt import BuildRequest

# --- where it builds


@pytest.mark.parametrize(
    ("runtime", "version"),
    [("tensorrt", "10.9.0.34"), ("tensorrt", "10.15.1.29"), ("tensorrt", "8.6.1"), ("tensorrt_rtx", "1.2.0.54")],
)
def test_another_version_is_refused_by_name(runtime, version):
    with pytest.raises(MachineError, match=rf"{runtime} {version} is installed; this tool knows "):
        tensorrt_build.require_version(runtime, version)


@pytest.mark.parametrize("version", ["10.14.1.48", "11.4.0.106"])
def test_the_containers_version_and_the_newest_major_are_known(version):
    tensorrt_build.require_version("tensorrt", version)


def test_tensorrt_without_a_gpu_in_the_machine_is_refused(monkeypatch):
    monkeypatch.setattr(tensorrt_build, "visible_gpus", lambda: ())
    with pytest.raises(MachineError, match="no GPU here: TensorRT builds for the GPU in the machine only"):
        tensorrt_build.require_gpu("9.0")


def test_tensorrt_on_another_gpu_than_the_skus_is_refused(monkeypatch):
    monkeypatch.setattr(tensorrt_build, "visible_gpus", lambda: (Gpu("NVIDIA L40S", "8.9", "0"),))
    with pytest.raises(NvlmError, match=r"GPU is NVIDIA L40S \(compute capability 8\.9\), .* has 9\.0"):
        tensorrt_build.require_gpu("9.0")
    assert tensorrt_build.require_gpu("8.9") == "NVIDIA L40S"


# --- timing cache


def test_kernel_times_are_kept_by_version_and_sku():
    request = BuildRequest(
        "a.onnx", "a.plan", "answer", "tensorrt", "bf16", "h200-141gb", "9.0", (1, 7, 8), "cache", 3, None
    )
    found = tensorrt_build.timing_cache(request, "10.14.1.48")
    assert found == Path("cache/tensorrt-10.14.1.48-h200-141gb.cache")
    assert tensorrt_build.timing_cache(dataclasses.replace(request, runtime="tensorrt_rtx"), "1.7.1.116") is None


class ConfigThatRemembers:
    """In place of tensorrt.IBuilderConfig: its three timing cache calls, as the docstrings of 10.14 and 11.4 say."""

    def __init__(self, *, accepts: bool = True) -> None:
        self.accepts, self.content = accepts, b""

    def create_timing_cache(self, serialized_timing_cache: bytes) -> bytes:
        return serialized_timing_cache

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        self.content = cache
        return self.accepts and not ignore_mismatch

    def get_timing_cache(self) -> ConfigThatRemembers:
        return self

    def serialize(self) -> bytes:
        return self.content + b"+"


def test_kernel_times_are_read_and_written_back(tmp_path):
    path = tmp_path / "folder" / "tensorrt.cache"
    for expected in (b"+", b"++"):
        config = ConfigThatRemembers()
        tensorrt_build.use_timing_cache(config, path)
        tensorrt_build.keep_timing_cache(config, path)
        assert path.read_bytes() == expected
    assert [entry.name for entry in path.parent.iterdir()] == ["tensorrt.cache"]


def test_kernel_times_of_another_gpu_are_refused_with_the_file_to_remove(tmp_path):
    with pytest.raises(NvlmError, match=r"timing cache .*times\.cache is of another GPU") as refusal:
        tensorrt_build.use_timing_cache(ConfigThatRemembers(accepts=False), tmp_path / "times.cache")
    assert "rm " in (refusal.value.hint or "")


# --- names of the builders' API

# dir() of the classes in the official Python bindings tensorrt_cu13_bindings 10.14.1.48.post1 and 11.4.0.106, imported
# in November 2026 beside empty stand-ins for NVIDIA's libraries; cut down to what this tool calls.
# Both have all of them.
RECORDED = {
    "Builder": {
        "create_network",
        "create_builder_config",
        "create_optimization_profile",
        "build_serialized_network_to_stream",
        "logger",
    },
    "NetworkDefinitionCreationFlag": {"STRONGLY_TYPED"},
    "INetworkDefinition": {"get_input", "get_output", "num_inputs", "num_outputs"},
    "ITensor": {"name", "shape"},
    "OnnxParser": {"parse_from_file", "num_errors", "get_error"},
    "ParserError": {"node_name", "node_operator", "desc", "code"},
    "ILogger": {"ERROR", "INFO", "log"},
    "IBuilderConfig": {
        "profiling_verbosity",
        "builder_optimization_level",
        "clear_flag",
        "set_memory_pool_limit",
        "add_optimization_profile",
        "create_timing_cache",
        "set_timing_cache",
        "get_timing_cache",
    },
    "BuilderFlag": {"TF32"},
    "MemoryPoolType": {"WORKSPACE"},
    "ProfilingVerbosity": {"DETAILED"},
    "IOptimizationProfile": {"set_shape"},
    "ITimingCache": {"serialize"},
    "IStreamWriter": {"write"},
}
# TensorRT-RTX alone builds for a target by name
ONLY_RTX = {
    "IBuilderConfig": {"num_compute_capabilities", "set_compute_capability"},
    "ComputeCapability": {"SM89"},
}


def test_tensorrt_rtx_has_every_name_that_is_called():
    rtx = pytest.importorskip("tensorrt_rtx_bindings", reason="its wheels are for x86-64 Linux (extra `test`)")
    for recorded in (RECORDED, ONLY_RTX):
        absent = {owner: names - set(dir(getattr(rtx, owner))) for owner, names in recorded.items()}
        assert not any(absent.values()), absent


def test_nothing_else_of_tensorrt_is_called():
    """Attributes of what holds a TensorRT object in the child's program, by the names it gives them there."""
    holders = {"trt", "builder", "network", "parser", "config", "profile", "error"}
    tree = ast.parse(Path(tensorrt_build.__file__).read_text())
    attributes = [
        (ast.unparse(node.value).split("."), node.attr) for node in ast.walk(tree) if isinstance(node, ast.Attribute)
    ]
    called = {name for owners, name in attributes if owners[-1] in holders or "trt" in owners}
    known = set().union(*RECORDED.values(), *ONLY_RTX.values(), RECORDED, ONLY_RTX, {"__version__", "__init__"})
    assert len(called) > 25
    assert called <= known, called - known
