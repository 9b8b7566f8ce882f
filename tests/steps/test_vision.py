"""The vision steps: what a profile may ask for, and that no engine is made of a graph that fails its gate."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.pipeline import State, run_step
from nvlm_deploy.profile import Profile, load_profile
from nvlm_deploy.recipe import Recipe
from nvlm_deploy.steps.order import pipeline_of
from nvlm_deploy.steps.vision import build_vision, export_vision, require_buildable
from nvlm_deploy.vision.engine import OnnxRuntimeEngine

CALIBRATION = Path(__file__).parents[1] / "models" / "calibration"


def profile(**vision: object) -> Profile:
    cpu = load_profile("cpu")
    sku = str(vision.pop("sku", "cpu"))
    return cpu.model_copy(update={"sku": sku, "vision": cpu.vision.model_copy(update=vision)})


def recipe_for(folder: Path, workspace: Path, **vision: object) -> Recipe:
    return Recipe(folder, profile(**vision), workspace, CALIBRATION)


@pytest.fixture(scope="module")
def exported(tiny_folder, tmp_path_factory) -> Recipe:
    """The trained small model's graph in BF16, without an engine yet."""
    recipe = recipe_for(tiny_folder, tmp_path_factory.mktemp("work"), precision="bf16")
    run_step(export_vision(recipe))
    return recipe


@pytest.mark.slow
def test_a_bf16_graph_becomes_an_engine_for_the_cpu_with_its_gates_report_beside_it(exported):
    state, artifact = run_step(build_vision(exported))
    assert state is State.BUILT
    assert "bf16 graph: cosine 0.999" in artifact.manifest.notes["numerics"]
    report = json.loads((artifact.folder / "numerics.json").read_text())
    assert report["passed"] is True
    tiles = np.zeros((1, 56, 56, 3), np.uint8)
    assert OnnxRuntimeEngine(artifact.folder / "vision.onnx")(tiles).shape == (1, 4, 256)
    assert run_step(build_vision(exported))[0] is State.UP_TO_DATE


@pytest.mark.slow
def test_a_graph_that_fails_its_gate_never_becomes_an_engine(exported, tmp_path):
    recipe = recipe_for(exported.checkpoint_folder, tmp_path, precision="bf16")
    run_step(export_vision(recipe))
    weights = recipe.vision_folder / "vision.onnx.data"
    damaged = np.fromfile(weights, np.uint16)
    damaged[len(damaged) // 2 :][:5000] ^= 0x4000
    damaged.tofile(weights)
    with pytest.raises(NvlmError, match="fails its numerics gate: block") as failure:
        run_step(build_vision(recipe))
    assert failure.value.exit_code == 1
    assert not recipe.vision_engine_folder.exists()
    with pytest.raises(NvlmError, match="vision-engine"):
        list(pipeline_of(recipe, "assemble").run())


@pytest.mark.slow
def test_fp8_records_its_calibration_and_serves_every_tile_close_to_float32(tiny_folder, tmp_path):
    recipe = recipe_for(tiny_folder, tmp_path, precision="fp8")
    _, artifact = run_step(export_vision(recipe))
    assert "calibration samples.jsonl" in artifact.manifest.inputs
    assert artifact.manifest.settings["weight_scales"] == "per_channel"
    assert artifact.manifest.outputs.keys() == {"vision.onnx", "vision.onnx.data", "calibration.json"}
    _, engine = run_step(build_vision(recipe))
    assert "fp8 graph: cosine 0.99" in engine.manifest.notes["numerics"]


@pytest.mark.parametrize(
    ("vision", "words"),
    [
        ({"runtime": "tensorrt_rtx", "precision": "fp8", "sku": "a100-80gb"}, r"a100-80gb .* has no FP8"),
        ({"runtime": "tensorrt_rtx", "precision": "bf16", "sku": "h200-141gb"}, "TensorRT-RTX has no target"),
        ({"runtime": "tensorrt_rtx", "precision": "bf16", "sku": "cpu"}, "'cpu' has no GPU"),
        ({"runtime": "tensorrt", "precision": "bf16", "sku": "l40s"}, "no Python module 'tensorrt' here"),
        ({"runtime": "onnxruntime", "precision": "fp32", "sku": "l4o0s"}, "no SKU 'l4o0s'"),
    ],
)
def test_what_the_profiles_gpu_cannot_do_is_refused_before_anything_is_read(vision, words):
    with pytest.raises(NvlmError, match=words):
        require_buildable(profile(**vision))


@pytest.mark.slow
def test_tensorrt_rtx_builds_the_profiles_engine_on_this_cpu(tiny_folder, tmp_path):
    recipe = recipe_for(tiny_folder, tmp_path, runtime="tensorrt_rtx", precision="bf16", sku="l40s")
    run_step(export_vision(recipe))
    _, artifact = run_step(build_vision(recipe))
    facts = json.loads((artifact.folder / "vision.plan.json").read_text())
    assert (facts["compute_capability"], facts["tiles"]) == ("8.9", [1, 7, 16])
    assert artifact.manifest.outputs["vision.plan"]
    assert "_gemm_mha" in (artifact.folder / "builder.log").read_text()
