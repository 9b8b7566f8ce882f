"""The vision steps: what a profile may ask for, and that no engine is made of a graph that fails its gate."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from nvlm_deploy.cli.main import run
from nvlm_deploy.errors import MachineError, NvlmError, RejectedError
from nvlm_deploy.pipeline import State, run_step
from nvlm_deploy.profile import Profile, load_profile
from nvlm_deploy.recipe import Recipe
from nvlm_deploy.sample_embeddings import tiles_of_file
from nvlm_deploy.samples import read_samples
from nvlm_deploy.steps.order import pipeline_of
from nvlm_deploy.steps.vision import build_vision, end_tiles, export_vision, gate_tiles, require_buildable
from nvlm_deploy.vision import lowering
from nvlm_deploy.vision.engine import OnnxRuntimeEngine
from nvlm_deploy.vision.lowering import write_lowered

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
    assert report["engine"]["evidence"] == "measured"
    assert report["engine"]["cosine"] > report["engine"]["bound"] == 0.999
    tiles = np.zeros((1, 56, 56, 3), np.uint8)
    assert OnnxRuntimeEngine(artifact.folder / "vision.onnx")(tiles).shape == (1, 4, 256)
    assert run_step(build_vision(exported))[0] is State.UP_TO_DATE


@pytest.mark.slow
def test_validate_numerics_judges_the_graph_and_the_engine_that_is_served(exported, tmp_path, capsys):
    run_step(build_vision(exported))
    profile_file = tmp_path / "cpu.toml"  # the workspace's folder is called as the profile is
    text = (Path(__file__).parents[2] / "engines" / "profiles" / "cpu.toml").read_text()
    profile_file.write_text(re.sub(r'precision = "\w+"', 'precision = "bf16"', text))
    command = ["validate", "numerics", str(exported.checkpoint_folder), "-p", str(profile_file)]
    with pytest.raises(SystemExit) as done:
        run([*command, "--workspace", str(exported.workspace), "--json"])
    assert done.value.code == 0
    document = json.loads(capsys.readouterr().out)
    assert document["engine"]["evidence"] == "measured"
    assert document["engine"]["cosine"] > 0.999


def rebuilt(exported: Recipe, workspace: Path, edit: Callable[[Path], None]) -> Recipe:
    """Another workspace, whose graph was exported wrongly."""
    recipe = recipe_for(exported.checkpoint_folder, workspace, precision="bf16")

    def make(folder: Path) -> dict[str, str]:
        for name in ("vision.onnx", "vision.onnx.data"):
            shutil.copyfile(exported.vision_folder / name, folder / name)
        edit(folder)
        return {}

    run_step(replace(export_vision(recipe), make=make))
    return recipe


def damage(folder: Path) -> None:
    weights = folder / "vision.onnx.data"
    damaged = np.fromfile(weights, np.uint16)
    damaged[len(damaged) // 2 :][:5000] ^= 0x4000
    damaged.tofile(weights)


def freeze(folder: Path) -> None:
    """To two tiles, the number that the tracer is given."""
    model = onnx.load(folder / "vision.onnx", load_external_data=False)
    shuffle = next(node for node in model.graph.node if "pixel_shuffle" in node.output)
    shape = next(tensor for tensor in model.graph.initializer if tensor.name == shuffle.input[1])
    entries = onnx.numpy_helper.to_array(shape).copy()
    entries[0] = 2
    shape.CopyFrom(onnx.numpy_helper.from_array(entries, shape.name))
    onnx.save(model, folder / "vision.onnx")


def lose_a_name(folder: Path) -> None:
    model = onnx.load(folder / "vision.onnx", load_external_data=False)
    for node in model.graph.node:
        for side in (node.input, node.output):
            side[:] = ["lost" if name == "block.1.fc1" else name for name in side]
    del model.graph.value_info[:]
    onnx.save(model, folder / "vision.onnx")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (damage, r"fails its numerics gate: block \d: .* in the file differs from the checkpoint"),
        (freeze, r"fails its numerics gate: pixel shuffle: on 1 tile\(s\) it cannot be run"),
        (lose_a_name, r"fails its numerics gate: block 1: fc1: the graph has no value named block\.1\.fc1"),
    ],
    ids=["other weights", "a frozen tile axis", "a lost name"],
)
def test_a_graph_that_fails_its_gate_never_becomes_an_engine(exported, tmp_path, edit, words):
    recipe = rebuilt(exported, tmp_path, edit)
    with pytest.raises(RejectedError, match=words):
        run_step(build_vision(recipe))
    assert not recipe.vision_engine_folder.exists()
    with pytest.raises(NvlmError, match="vision-engine"):
        list(pipeline_of(recipe, "assemble").run())


@pytest.mark.slow
def test_an_engine_that_is_not_its_graph_is_not_kept(exported, tmp_path, monkeypatch):
    def wrongly_written(onnx: Path, folder: Path) -> Path:
        path = write_lowered(onnx, folder)
        damage(folder)
        return path

    monkeypatch.setattr(lowering, "write_lowered", wrongly_written)
    recipe = rebuilt(exported, tmp_path, lambda _: None)
    with pytest.raises(RejectedError, match=r"whose graph passes its gate: .*(cosine|NaN)"):
        run_step(build_vision(recipe))
    assert not recipe.vision_engine_folder.exists()


def test_the_gate_looks_at_different_pictures(tiny_spec):
    samples = read_samples(CALIBRATION)
    tiles = gate_tiles(tiny_spec, 3, samples)
    pictures = list(dict.fromkeys(image for sample in samples for image in sample.images))
    assert [tile.tobytes() for tile in tiles] == [
        tiles_of_file(path, tiny_spec.tiling)[0].tobytes() for path in pictures[:3]
    ]
    one = [sample for sample in samples if sample.images[:1] == (pictures[0],)][:1]
    assert len(gate_tiles(tiny_spec, 3, one)) == min(3, len(tiles_of_file(pictures[0], tiny_spec.tiling)))


def test_the_end_of_fp8_is_judged_on_more_tiles_where_that_costs_seconds(tiny_spec):
    samples = read_samples(CALIBRATION)
    assert end_tiles(tiny_spec, 2, "fp8", samples) == 32
    assert end_tiles(tiny_spec, 2, "fp8") == 2
    assert end_tiles(tiny_spec, 2, "bf16", samples) == 2
    vision = replace(tiny_spec.vision, hidden_size=3200, intermediate_size=12800, layers=45, image_size=448)
    assert end_tiles(replace(tiny_spec, vision=vision), 2, "fp8", samples) == 2


@pytest.mark.slow
def test_fp8_records_its_calibration_and_serves_every_tile_close_to_float32(tiny_folder, tmp_path):
    recipe = recipe_for(tiny_folder, tmp_path, precision="fp8")
    _, artifact = run_step(export_vision(recipe))
    assert "calibration samples.jsonl" in artifact.manifest.inputs
    assert artifact.manifest.settings["weight_scales"] == "per_channel"
    assert artifact.manifest.outputs.keys() == {"vision.onnx", "vision.onnx.data", "calibration.json"}
    _, engine = run_step(build_vision(recipe))
    assert "fp8 graph: cosine 0.99" in engine.manifest.notes["numerics"]
    assert "on 32 tiles" in engine.manifest.notes["numerics"]
    cosines = json.loads((engine.folder / "numerics.json").read_text())["engine"]["per_tile"]["cosine"]
    assert len(cosines) == 32
    assert min(cosines) > 0.99


@pytest.mark.parametrize(
    ("vision", "words"),
    [
        ({"runtime": "tensorrt_rtx", "precision": "fp8", "sku": "a100-80gb"}, r"a100-80gb .* has no FP8"),
        ({"runtime": "tensorrt_rtx", "precision": "bf16", "sku": "h200-141gb"}, "TensorRT-RTX has no target"),
        ({"runtime": "tensorrt_rtx", "precision": "bf16", "sku": "cpu"}, "'cpu' has no GPU"),
        ({"runtime": "onnxruntime", "precision": "fp32", "sku": "l4o0s"}, "no SKU 'l4o0s'"),
    ],
)
def test_what_the_profiles_gpu_cannot_do_is_refused_before_anything_is_read(vision, words):
    with pytest.raises(NvlmError, match=words):
        require_buildable(profile(**vision))


def test_a_builder_that_is_not_installed_stops_a_build_and_no_dry_run(tiny_folder: Path, tmp_path: Path) -> None:
    recipe = recipe_for(tiny_folder, tmp_path, runtime="tensorrt", precision="bf16", sku="l40s")
    require_buildable(recipe.profile)
    with pytest.raises(MachineError, match="no Python module 'tensorrt' here"):
        pipeline_of(recipe, "build-vision")
    assert dict(pipeline_of(recipe, "build-vision", dry_run=True).plan()) == {"build-vision": State.TO_BUILD}


@pytest.mark.slow
def test_tensorrt_rtx_builds_the_profiles_engine_on_this_cpu(tiny_folder, tmp_path):
    recipe = recipe_for(tiny_folder, tmp_path, runtime="tensorrt_rtx", precision="bf16", sku="l40s")
    run_step(export_vision(recipe))
    _, artifact = run_step(build_vision(recipe))
    facts = json.loads((artifact.folder / "vision.plan.json").read_text())
    assert (facts["compute_capability"], facts["tiles"]) == ("8.9", [1, 7, 16])
    assert artifact.manifest.outputs["vision.plan"]
    verdict = json.loads((artifact.folder / "numerics.json").read_text())["engine"]
    assert verdict["evidence"] == "not run"
    assert "l40s" in verdict["why"]
    assert "_gemm_mha" in (artifact.folder / "builder.log").read_text()
