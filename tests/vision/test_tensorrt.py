"""Engines by the official TensorRT-RTX builder, on a machine without a GPU; what is refused, and in whose words."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto, helper, numpy_helper

from nvlm_deploy.errors import MachineError, NvlmError
from nvlm_deploy.sku import load_sku
from nvlm_deploy.vision import tensorrt, tensorrt_build
from nvlm_deploy.vision.numerics.compare import noise_tiles
from nvlm_deploy.vision.tensorrt import BuildSettings, TileRange, engine_from_onnx, precision_of, tile_range

pytestmark = pytest.mark.slow

rtx = pytest.importorskip("tensorrt_rtx_bindings", reason="its wheels are for x86-64 Linux (extra `test`)")

TYPES = {
    "fp32": TensorProto.FLOAT,
    "fp16": TensorProto.FLOAT16,
    "bf16": TensorProto.BFLOAT16,
    "fp8": TensorProto.BFLOAT16,
}


def _weight(base: int, weight: np.ndarray) -> onnx.TensorProto:
    if base == TensorProto.FLOAT:
        return numpy_helper.from_array(weight, "weight")  # as raw bytes, which alone may lie in another file
    return helper.make_tensor("weight", base, weight.shape, weight.ravel())


def small_graph(folder: Path, precision: str, *, operator: str = "Gelu", external: bool = False) -> Path:
    """tiles [n, 8, 8, 3] -> one linear and one operator -> embeddings [n, 4, 16]; fp8 quantises both sides of it."""
    base = TYPES[precision]
    weight = np.random.default_rng(0).normal(size=(48, 16)).astype(np.float32)
    constants = [
        numpy_helper.from_array(np.array([0, 4, 48], dtype=np.int64), "shape"),
        helper.make_tensor("scale", base, [], [0.02]),
        helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], [0.0]),
    ]
    nodes = [
        helper.make_node("Cast", ["tiles"], ["cast"], to=base),
        helper.make_node("Reshape", ["cast", "shape"], ["rows"]),
    ]
    if precision == "fp8":
        constants += [helper.make_tensor("weight8", TensorProto.FLOAT8E4M3FN, [48, 16], weight.ravel())]
        nodes += [
            helper.make_node("QuantizeLinear", ["rows", "scale", "zero"], ["rows8"]),
            helper.make_node("DequantizeLinear", ["rows8", "scale", "zero"], ["input"]),
            helper.make_node("DequantizeLinear", ["weight8", "scale", "zero"], ["weight"]),
        ]
    else:
        constants = [*constants[:1], _weight(base, weight)]
        nodes += [helper.make_node("Identity", ["rows"], ["input"])]
    nodes += [
        helper.make_node("MatMul", ["input", "weight"], ["product"]),
        helper.make_node(operator, ["product"], ["active"], name="the_operator"),
        helper.make_node("Cast", ["active"], ["embeddings"], to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("tiles", TensorProto.UINT8, ["tiles", 8, 8, 3])],
        [helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, ["tiles", 4, 16])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "vision.onnx"
    onnx.save(model, path, save_as_external_data=external, location="vision.onnx.data", size_threshold=64)
    return path


@pytest.fixture
def settings(tmp_path) -> BuildSettings:
    return BuildSettings("tensorrt_rtx", load_sku("l40s"), TileRange(1, 7, 8), tmp_path / "cache")


@pytest.fixture
def engine_folder(tmp_path) -> Path:
    folder = tmp_path / "engine"
    folder.mkdir()
    return folder


@pytest.fixture
def no_child(monkeypatch):
    """What is refused before a build starts no process."""

    def started(*_: object) -> None:
        raise AssertionError("a child process was started")

    monkeypatch.setattr(tensorrt.subprocess, "run", started)


# --- what is built


@pytest.mark.parametrize("precision", list(TYPES))
def test_the_official_builder_makes_a_plan_of_every_precision(settings, engine_folder, tmp_path, precision):
    plan = engine_from_onnx(small_graph(tmp_path, precision), engine_folder, settings)
    assert plan == engine_folder / "vision.plan"
    assert sorted(path.name for path in engine_folder.iterdir()) == ["builder.log", "vision.plan", "vision.plan.json"]
    facts = json.loads((engine_folder / "vision.plan.json").read_text())
    assert facts["plan_bytes"] == plan.stat().st_size > 1000
    assert (facts["runtime"], facts["version"][:4], facts["precision"]) == ("tensorrt_rtx", "1.7.", precision)
    assert (facts["sku"], facts["compute_capability"], facts["gpu"]) == ("l40s", "8.9", None)
    assert facts["tiles"] == [1, 7, 8]


def test_the_log_says_which_kernels_were_chosen(settings, engine_folder, tmp_path):
    engine_from_onnx(small_graph(tmp_path, "bf16"), engine_folder, settings)
    log = (engine_folder / "builder.log").read_text()
    assert "Layers:" in log
    assert "LayerType" in log


def test_nothing_is_left_in_the_cache_folder_by_a_build_that_succeeds(settings, engine_folder, tmp_path):
    engine_from_onnx(small_graph(tmp_path, "bf16"), engine_folder, settings)
    assert not settings.cache_folder.exists()


@pytest.fixture(scope="module", params=["fp32", "fp16", "bf16", "fp8"])
def exported(request, random_checkpoint, tmp_path_factory, traced_once) -> tuple[str, Path]:
    """The small model's graph as our own exporter writes it."""
    from nvlm_deploy.model.spec import spec_from_checkpoint
    from nvlm_deploy.vision.export import Fp8Source, onnx_from_checkpoint
    from nvlm_deploy.vision.qdq import Fp8Choice

    folder = tmp_path_factory.mktemp("exported") / request.param
    spec = spec_from_checkpoint(random_checkpoint)
    fp8 = Fp8Source(Fp8Choice(attention=True), [noise_tiles(2, 56)]) if request.param == "fp8" else None
    with traced_once():
        return request.param, onnx_from_checkpoint(random_checkpoint, spec, folder, precision=request.param, fp8=fp8)


@pytest.mark.parametrize("sku", ["a100-80gb", "l40s", "rtx-pro-6000"])
def test_the_official_builder_accepts_the_small_model(settings, engine_folder, exported, sku):
    precision, graph = exported
    if precision == "fp8" and not load_sku(sku).has_fp8:
        with pytest.raises(NvlmError, match="has no FP8"):
            engine_from_onnx(graph, engine_folder, dataclasses.replace(settings, sku=load_sku(sku)))
        return
    plan = engine_from_onnx(graph, engine_folder, dataclasses.replace(settings, sku=load_sku(sku)))
    facts = json.loads((engine_folder / "vision.plan.json").read_text())
    print(f"{precision} for {sku}: {plan.stat().st_size} bytes in {facts['seconds']} s")
    assert facts["precision"] == precision_of(graph) == precision
    assert facts["plan_bytes"] > 1_000_000


def test_polygraphy_an_independent_driver_of_the_same_builder_accepts_our_file(exported, tmp_path):
    # without the metapackage nothing is called `tensorrt_rtx`; this is all that the metapackage holds
    (tmp_path / "tensorrt_rtx.py").write_text(
        "from tensorrt_rtx_bindings import *\nfrom tensorrt_rtx_bindings import __version__\n"
    )
    command = [str(Path(sys.executable).with_name("polygraphy")), "convert", str(exported[1]), "--convert-to", "trt"]
    shapes = [f"tiles:[{count},56,56,3]" for count in (1, 7, 8)]
    flags = [
        word
        for flag, shape in zip(("min", "opt", "max"), shapes, strict=True)
        for word in (f"--trt-{flag}-shapes", shape)
    ]
    result = subprocess.run(
        [*command, *flags, "--compute-capabilities", "8.9", "-o", str(tmp_path / "peer.plan")],
        env={**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": "1", "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "peer.plan").stat().st_size > 1_000_000


# --- the number of tiles


def test_an_engine_takes_one_tile_to_the_budget_tuned_for_a_full_image(tiny_spec):
    assert tiny_spec.tiling.max_tiles_with_thumbnail == 7
    assert tile_range(tiny_spec.tiling, most_tiles=16) == TileRange(1, 7, 16)
    assert tile_range(tiny_spec.tiling, most_tiles=4) == TileRange(1, 4, 4)


@pytest.mark.parametrize("counts", [(0, 1, 1), (1, 8, 7), (2, 1, 7)])
def test_a_range_that_is_none_is_refused(counts):
    with pytest.raises(NvlmError, match=rf"no engine takes {counts[0]} to {counts[2]} tiles"):
        TileRange(*counts)


def test_a_budget_of_no_tiles_is_refused(tiny_spec):
    with pytest.raises(NvlmError, match="no engine takes 1 to 0 tiles"):
        tile_range(tiny_spec.tiling, most_tiles=0)


@pytest.fixture
def build_objects(settings, tmp_path):
    """Everything that the child makes before it builds, of the real TensorRT-RTX."""
    graph = small_graph(tmp_path, "bf16")
    request = tensorrt._request(graph, tmp_path, tmp_path, "bf16", settings)
    session = tensorrt_build.Session.of(rtx)
    network, parser = tensorrt_build.parsed_network(session, graph)
    yield session, network, request
    del network, parser


def test_the_optimisation_profile_covers_the_whole_range_and_binds_the_pixels(build_objects):
    session, network, request = build_objects
    profile = tensorrt_build.optimization_profile(session, network, request)
    assert [tuple(shape) for shape in profile.get_shape("tiles")] == [(n, 8, 8, 3) for n in (1, 7, 8)]


def test_the_network_is_strongly_typed_and_the_builder_gets_no_precision(build_objects):
    session, network, request = build_objects
    config = tensorrt_build.builder_config(session, request)
    assert network.get_flag(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    assert not config.get_flag(rtx.BuilderFlag.VERSION_COMPATIBLE)
    assert config.get_compute_capability(0) == rtx.ComputeCapability.SM89
    assert config.profiling_verbosity == rtx.ProfilingVerbosity.DETAILED


@pytest.mark.parametrize(("precision", "tf32"), [("fp32", False), ("bf16", True)])
def test_tf32_is_off_only_where_the_graph_is_fp32(build_objects, precision, tf32):
    session, _, request = build_objects
    config = tensorrt_build.builder_config(session, dataclasses.replace(request, precision=precision))
    assert config.get_flag(rtx.BuilderFlag.TF32) is tf32


def test_a_bound_on_the_workspace_and_an_effort_reach_the_builder(build_objects):
    session, _, request = build_objects
    request = dataclasses.replace(request, workspace_bytes=1 << 30, optimization_level=1)
    config = tensorrt_build.builder_config(session, request)
    assert config.get_memory_pool_limit(rtx.MemoryPoolType.WORKSPACE) == 1 << 30
    assert config.builder_optimization_level == 1


def test_a_full_disk_ends_the_build_with_the_systems_words_not_with_a_crash(build_objects):
    session, network, request = build_objects
    config = tensorrt_build.builder_config(session, request)
    config.add_optimization_profile(tensorrt_build.optimization_profile(session, network, request))
    with Path("/dev/full").open("wb", buffering=0) as full, pytest.raises(OSError, match="No space left on device"):
        tensorrt_build.write_plan(session, network, config, full)


# --- what is refused before a build


@pytest.mark.parametrize("precision", list(TYPES))
def test_the_precision_is_read_from_the_graph(tmp_path, precision):
    assert precision_of(small_graph(tmp_path, precision)) == precision


def test_a_graph_that_only_casts_to_fp8_holds_fp8(tmp_path):
    nodes = [
        helper.make_node("Cast", ["x"], ["low"], to=TensorProto.FLOAT8E4M3FN),
        helper.make_node("Cast", ["low"], ["y"], to=TensorProto.FLOAT),
    ]
    sides = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in ("x", "y")]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", sides[:1], sides[1:])), tmp_path / "cast.onnx")
    assert precision_of(tmp_path / "cast.onnx") == "fp8"


@pytest.mark.usefixtures("no_child")
@pytest.mark.parametrize("runtime", ["tensorrt", "tensorrt_rtx"])
def test_an_fp8_graph_for_an_a100_is_refused_with_the_reason_and_a_way_on(settings, engine_folder, tmp_path, runtime):
    settings = dataclasses.replace(settings, runtime=runtime, sku=load_sku("a100-80gb"))
    with pytest.raises(NvlmError, match=r"a100-80gb \(compute capability 8\.0\) has no FP8") as refusal:
        engine_from_onnx(small_graph(tmp_path, "fp8"), engine_folder, settings)
    assert 'precision = "bf16"' in (refusal.value.hint or "")


def test_the_builder_itself_would_have_refused_it_later_and_darkly(settings, engine_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tensorrt, "require_target", lambda *_: None)
    settings = dataclasses.replace(settings, sku=load_sku("a100-80gb"))
    with pytest.raises(NvlmError, match=r"the builder refuses the graph[\s\S]*fp8_e4m3"):
        engine_from_onnx(small_graph(tmp_path, "fp8"), engine_folder, settings)


def test_bf16_for_a_gpu_older_than_ampere_is_refused():
    turing = load_sku("l40s").model_copy(update={"name": "t4", "compute_capability": "7.5"})
    with pytest.raises(NvlmError, match=r"t4 \(compute capability 7\.5\) has no BF16.*8\.0") as refusal:
        tensorrt.require_target("tensorrt", "bf16", turing)
    assert 'precision = "fp16"' in (refusal.value.hint or "")
    tensorrt.require_target("tensorrt", "fp16", turing)


@pytest.mark.usefixtures("no_child")
@pytest.mark.parametrize("sku", ["h100-sxm-80gb", "h200-141gb", "b200"])
def test_tensorrt_rtx_for_a_data_centre_gpu_without_target_points_to_tensorrt(settings, engine_folder, tmp_path, sku):
    settings = dataclasses.replace(settings, sku=load_sku(sku))
    with pytest.raises(NvlmError, match=rf"TensorRT-RTX has no target for {sku}") as refusal:
        engine_from_onnx(small_graph(tmp_path, "bf16"), engine_folder, settings)
    assert 'runtime = "tensorrt"' in (refusal.value.hint or "")


def test_the_targets_we_name_are_those_of_the_builder():
    members = set(rtx.ComputeCapability.__members__) - {"NONE", "CURRENT"}
    assert {f"SM{target.replace('.', '')}" for target in tensorrt.RTX_TARGETS} == members


@pytest.mark.usefixtures("no_child")
def test_a_sku_without_a_gpu_is_refused(settings, engine_folder, tmp_path):
    with pytest.raises(NvlmError, match="SKU 'cpu' has no GPU"):
        engine_from_onnx(
            small_graph(tmp_path, "bf16"), engine_folder, dataclasses.replace(settings, sku=load_sku("cpu"))
        )


def test_an_unknown_builder_is_refused_with_those_there_are():
    with pytest.raises(NvlmError, match="no engine builder 'onnxruntime'; there is tensorrt, tensorrt_rtx"):
        tensorrt.require_target("onnxruntime", "bf16", load_sku("l40s"))


@pytest.mark.usefixtures("no_child")
def test_enterprise_tensorrt_where_it_is_not_installed_is_refused_naming_where_it_is(settings, engine_folder, tmp_path):
    settings = dataclasses.replace(settings, runtime="tensorrt", sku=load_sku("h100-sxm-80gb"))
    with pytest.raises(MachineError, match="no Python module 'tensorrt'") as refusal:
        engine_from_onnx(small_graph(tmp_path, "bf16"), engine_folder, settings)
    assert "container" in (refusal.value.hint or "")


def test_tensorrt_rtx_where_it_is_not_installed_is_refused_naming_the_packages(monkeypatch):
    monkeypatch.setattr(tensorrt.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MachineError, match="no Python module 'tensorrt_rtx'") as refusal:
        tensorrt.installed_module("tensorrt_rtx")
    assert "pip install tensorrt_rtx_cu13_libs" in (refusal.value.hint or "")


def test_a_missing_graph_is_named(settings, engine_folder, tmp_path):
    with pytest.raises(NvlmError, match=r"no vision graph .*nowhere\.onnx"):
        engine_from_onnx(tmp_path / "nowhere.onnx", engine_folder, settings)


def test_a_file_that_is_no_graph_is_named(settings, engine_folder, tmp_path):
    (tmp_path / "vision.onnx").write_bytes(b"not a graph")
    with pytest.raises(NvlmError, match=r"vision\.onnx cannot be read"):
        engine_from_onnx(tmp_path / "vision.onnx", engine_folder, settings)


# --- what the builder refuses, in its words


def test_an_operator_that_tensorrt_does_not_know_is_refused_by_node_in_the_parsers_words(
    settings, engine_folder, tmp_path
):
    graph = small_graph(tmp_path, "fp32", operator="Det")
    with pytest.raises(NvlmError, match=r"the parser refuses it[\s\S]*node 'the_operator' \(Det\)") as refusal:
        engine_from_onnx(graph, engine_folder, settings)
    assert refusal.value.exit_code == 2
    assert "UNSUPPORTED_NODE" in refusal.value.message
    assert not (engine_folder / "vision.plan").exists()


def test_the_log_of_a_refused_build_outlives_the_folder_it_was_for(settings, engine_folder, tmp_path):
    graph = small_graph(tmp_path, "fp32", operator="Det")
    with pytest.raises(NvlmError, match=r"log: .*cache/tensorrt_rtx-l40s-failed\.log"):
        engine_from_onnx(graph, engine_folder, settings)
    kept = settings.cache_folder / "tensorrt_rtx-l40s-failed.log"
    assert kept.read_text() == (engine_folder / "builder.log").read_text()
    assert "the_operator" in kept.read_text()


def test_weights_that_are_cut_short_are_refused_before_the_build(settings, engine_folder, tmp_path):
    graph = small_graph(tmp_path, "fp32", external=True)
    with (tmp_path / "vision.onnx.data").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(NvlmError, match=r"vision\.onnx\.data has 100 bytes, vision\.onnx needs 3,072"):
        engine_from_onnx(graph, engine_folder, settings)


def test_weights_that_are_missing_are_refused_before_the_build(settings, engine_folder, tmp_path):
    graph = small_graph(tmp_path, "fp32", external=True)
    (tmp_path / "vision.onnx.data").unlink()
    with pytest.raises(NvlmError, match=r"vision\.onnx\.data is missing"):
        engine_from_onnx(graph, engine_folder, settings)


def test_a_graph_of_something_else_is_refused_with_what_it_maps(settings, engine_folder, tmp_path):
    sides = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "other", sides[:1], sides[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(NvlmError, match=r"maps \['x'\] to \['y'\]"):
        engine_from_onnx(tmp_path / "other.onnx", engine_folder, settings)


# --- a child that dies


def dying(monkeypatch, program: str) -> None:
    monkeypatch.setattr(tensorrt, "_command", lambda _: [sys.executable, "-c", program])


@pytest.mark.parametrize(
    ("how", "telling", "hint"),
    [
        ("os.kill(os.getpid(), 9)", "was ended by SIGKILL", "out of memory"),
        ("os.kill(os.getpid(), 11)", "was ended by SIGSEGV", "optimization_level"),
        ("sys.exit(137)", "ended with exit code 137", "out of memory"),
        ("raise TypeError('factory returned nullptr')", "ended with exit code 1", "failed.log"),
        ("sys.exit(2)", "ended with exit code 2", "failed.log"),
        ("sys.exit(0)", "ended with exit code 0", "failed.log"),
    ],
)
def test_a_builder_that_dies_is_the_machines_fault_with_its_last_words(
    settings, engine_folder, tmp_path, monkeypatch, how, telling, hint
):
    dying(monkeypatch, f"import os, sys; print('tactic 41 of 99', flush=True); {how}")
    with pytest.raises(MachineError, match=rf"builder {telling} at .*vision\.onnx[\s\S]*tactic 41 of 99") as death:
        engine_from_onnx(small_graph(tmp_path, "bf16"), engine_folder, settings)
    assert hint in (death.value.hint or "")
    assert (settings.cache_folder / "tensorrt_rtx-l40s-failed.log").is_file()


def test_the_real_builder_killed_in_the_middle_leaves_no_plan(settings, engine_folder, tmp_path):
    def kill() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            for child in psutil.Process().children():
                if "nvlm_deploy.vision.tensorrt_build" in " ".join(child.cmdline()):
                    child.send_signal(signal.SIGKILL)
                    return
            time.sleep(0.01)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(MachineError, match="was ended by SIGKILL"):
        engine_from_onnx(small_graph(tmp_path, "bf16"), engine_folder, settings)
    killer.join()
    assert [path.name for path in engine_folder.iterdir()] == ["builder.log"]
