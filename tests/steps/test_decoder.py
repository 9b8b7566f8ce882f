"""The decoder's steps: one calibration for every split, what needs none, what is refused before a step starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from nvlm_deploy.checkpoint.trtllm import read_checkpoint
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.llm.calibrate import CalibrationResult
from nvlm_deploy.manifest import read_manifest
from nvlm_deploy.pipeline import State, digest_of_input
from nvlm_deploy.profile import CalibrationChoice, Profile, load_profile
from nvlm_deploy.recipe import Recipe, steps_of_build
from nvlm_deploy.slots import slots_of
from nvlm_deploy.steps.decoder import RESULT_NAME, quantize_llm
from nvlm_deploy.steps.dry_run import Surroundings, dry_run_of, engine_commands
from nvlm_deploy.steps.order import pipeline_of

CALIBRATION = Path(__file__).parents[1] / "models" / "calibration"


def profile(name: str = "mine", *, samples: int = 4, sku: str = "cpu", **decoder: object) -> Profile:
    cpu = load_profile("cpu")
    changes = {"name": name, "sku": sku, "calibration": CalibrationChoice(samples=samples)}
    return cpu.model_copy(update={**changes, "decoder": cpu.decoder.model_copy(update=decoder)})


def run(recipe: Recipe, *steps: str) -> dict[str, State]:
    return {step.name: state for name in steps for step, state in pipeline_of(recipe, name).run()}


@pytest.fixture(scope="module")
def calibrated(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """The trained small model, calibrated with four samples."""
    recipe = Recipe(tiny_folder, profile(), tmp_path_factory.mktemp("work"), CALIBRATION)
    run(recipe, "export-vision", "build-vision", "calibrate-llm")
    return recipe


@pytest.mark.slow
def test_one_calibration_serves_every_split_and_recipe_and_profile(calibrated: Recipe) -> None:
    for choices in ({"tensor_parallel": 2}, {"pipeline_parallel": 2}, {"kv_cache": "fp8"}):
        other = Recipe(calibrated.checkpoint_folder, profile(**choices), calibrated.workspace, CALIBRATION)
        assert run(other, "calibrate-llm", "quantize-llm") == {
            "calibrate-llm": State.UP_TO_DATE,
            "quantize-llm": State.BUILT,
        }
        assert read_checkpoint(other.decoder_folder).layout == other.layout()
    neighbour = Recipe(calibrated.checkpoint_folder, profile("other"), calibrated.workspace, CALIBRATION)
    shutil.copytree(calibrated.vision_folder, neighbour.vision_folder)
    assert run(neighbour, "calibrate-llm") == {"calibrate-llm": State.UP_TO_DATE}
    assert neighbour.decoder_folder != calibrated.decoder_folder


@pytest.mark.slow
def test_a_profile_of_another_split_takes_the_calibration_without_an_export_of_its_own(
    calibrated: Recipe, tmp_path: Path
) -> None:
    def split(workspace: Path, checkpoint: Path = calibrated.checkpoint_folder, **vision: object) -> Recipe:
        other = profile("split", tensor_parallel=2)
        encoder = other.vision.model_copy(update=vision)
        return Recipe(checkpoint, other.model_copy(update={"vision": encoder}), workspace, CALIBRATION)

    shutil.copytree(calibrated.workspace / "engines" / "calibrations", tmp_path / "engines" / "calibrations")
    recipe = split(tmp_path)
    assert run(recipe, "quantize-llm", "export-hf") == {"quantize-llm": State.BUILT, "export-hf": State.BUILT}
    assert not recipe.vision_folder.exists()
    with pytest.raises(NvlmError, match=r"no .*calibrations"):
        run(split(tmp_path, precision="bf16"), "quantize-llm")
    assert run(recipe, "calibrate-llm") == {"calibrate-llm": State.UP_TO_DATE}
    with pytest.raises(NvlmError, match=r"no .*split.vision"):
        run(split(tmp_path / "elsewhere"), "calibrate-llm")
    other = tmp_path / "other checkpoint"
    shutil.copytree(calibrated.checkpoint_folder, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    (other / "tokenizer.json").write_text(json.dumps(tokenizer, indent=3))
    with pytest.raises(NvlmError, match=r"input tokenizer\.json differs"):
        run(split(tmp_path, other), "quantize-llm")


@pytest.mark.slow
def test_the_manifest_states_how_many_samples_there_were_not_how_many_were_asked_for(
    calibrated: Recipe, tmp_path: Path
) -> None:
    (tmp_path / "samples.jsonl").write_text('{"question": "What?", "answer": "That"}\n')
    recipe = Recipe(calibrated.checkpoint_folder, profile(samples=3), tmp_path / "work", tmp_path)
    shutil.copytree(calibrated.vision_folder, recipe.vision_folder)
    run(recipe, "calibrate-llm", "quantize-llm")
    manifest = json.loads((recipe.calibration_result_folder / "manifest.json").read_text())
    assert (manifest["settings"]["samples"], manifest["notes"]["samples"]) == (1, 1)
    assert read_manifest(recipe.decoder_folder).notes["calibration"]["samples"] == 1


@pytest.mark.slow
def test_the_manifest_names_the_list_the_pictures_and_the_encoder_and_nothing_unfinished_is_left(
    calibrated: Recipe,
) -> None:
    folder = calibrated.calibration_result_folder
    assert sorted(path.name for path in folder.iterdir()) == [RESULT_NAME, "manifest.json"]
    manifest = json.loads((folder / "manifest.json").read_text())
    inputs = manifest["inputs"]
    assert manifest["settings"]["encoder"] == read_manifest(calibrated.vision_folder).key
    assert manifest["notes"]["vision"] == digest_of_input(calibrated.vision_folder)
    assert {"config.json", "tokenizer.json", "calibration samples.jsonl"} < inputs.keys()
    assert any(name.endswith(".jpg") for name in inputs)
    assert CalibrationResult.load(folder / RESULT_NAME).samples == 4


@pytest.mark.slow
def test_other_samples_wrapper_or_encoder_are_another_calibration(calibrated: Recipe) -> None:
    def folder(recipe_profile: Profile) -> Path:
        return Recipe(
            calibrated.checkpoint_folder, recipe_profile, calibrated.workspace, CALIBRATION
        ).calibration_result_folder

    same = profile(tensor_parallel=2)
    assert folder(same) == calibrated.calibration_result_folder
    for other in (
        profile(samples=5),
        same.model_copy(update={"serving": same.serving.model_copy(update={"wrapper": "raw"})}),
        same.model_copy(update={"vision": same.vision.model_copy(update={"precision": "bf16"})}),
    ):
        assert folder(other) != calibrated.calibration_result_folder


@pytest.mark.slow
def test_an_encoder_whose_engine_needs_a_gpu_calibrates_the_decoder_without_one(
    calibrated: Recipe, tmp_path: Path
) -> None:
    """The graph is what the plan is made of; in float32 it is the very graph that the CPU serves."""
    plan = calibrated.profile.vision.model_copy(update={"runtime": "tensorrt_rtx"})
    recipe = Recipe(
        calibrated.checkpoint_folder, calibrated.profile.model_copy(update={"vision": plan}), tmp_path, CALIBRATION
    )
    shutil.copytree(calibrated.vision_folder, recipe.vision_folder)
    run(recipe, "calibrate-llm")
    found, expected = (
        CalibrationResult.load(one.calibration_result_folder / RESULT_NAME) for one in (recipe, calibrated)
    )
    assert found == expected


@pytest.mark.parametrize(
    ("choices", "names"),
    [
        ({}, ["export-vision", "build-vision", "calibrate-llm", "quantize-llm", "assemble"]),
        ({"quantization": "none"}, ["export-vision", "build-vision", "quantize-llm", "assemble"]),
        ({"quantization": "fp8_per_channel"}, ["export-vision", "build-vision", "quantize-llm", "assemble"]),
        (
            {"quantization": "fp8_per_channel", "kv_cache": "fp8"},
            ["export-vision", "build-vision", "calibrate-llm", "quantize-llm", "assemble"],
        ),
        (
            {"quantization": "fp8_per_channel", "kv_cache": "fp8", "samples": 0},
            ["export-vision", "build-vision", "quantize-llm", "assemble"],
        ),
        (
            {"runtime": "tensorrt_llm", "sku": "h100-sxm-80gb"},
            ["export-vision", "build-vision", "calibrate-llm", "quantize-llm", "build-llm", "assemble"],
        ),
    ],
    ids=["fp8", "bf16", "per channel", "per channel, fp8 cache", "data-free", "engines"],
)
def test_a_build_has_the_steps_that_its_profile_needs(
    tiny_folder: Path, tmp_path: Path, choices: dict[str, object], names: list[str]
) -> None:
    assert steps_of_build(Recipe(tiny_folder, profile(**choices), tmp_path, CALIBRATION)) == names


@pytest.mark.parametrize(
    ("choices", "step", "words"),
    [
        ({"samples": 0}, "quantize-llm", "cannot be known from weights"),
        ({"samples": 0}, "export-hf", "fp8_per_channel"),
        ({"samples": 0}, "calibrate-llm", "cannot be known from weights"),
        ({"samples": 0, "quantization": "none", "kv_cache": "fp8"}, "calibrate-llm", "it is data-free"),
        (
            {"runtime": "tensorrt_llm", "sku": "a100-80gb", "quantization": "none", "kv_cache": "fp8"},
            "build-llm",
            "its KV cache cannot be FP8",
        ),
        ({"quantization": "none"}, "calibrate-llm", "needs no calibration"),
        ({}, "build-llm", "which has no engines"),
        ({"runtime": "tensorrt_llm"}, "build-llm", "has no GPU"),
        ({"runtime": "tensorrt_llm", "sku": "a100-80gb"}, "build-llm", "has no FP8"),
        ({"tensor_parallel": 3}, "quantize-llm", "legal"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    tiny_folder: Path, tmp_path: Path, choices: dict[str, object], step: str, words: str
) -> None:
    with pytest.raises(NvlmError) as refusal:
        run(Recipe(tiny_folder, profile(**choices), tmp_path / "work", CALIBRATION), step)
    assert words in f"{refusal.value.message} {refusal.value.hint}"
    assert refusal.value.exit_code == 2
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"]


def test_the_commands_of_engines_are_said_without_a_container(tiny_folder: Path, tmp_path: Path) -> None:
    choices = {"runtime": "tensorrt_llm", "sku": "h100-sxm-80gb", "tensor_parallel": 2, "kv_cache": "fp8"}
    recipe = Recipe(tiny_folder, profile(**choices, max_num_tokens=2048), tmp_path, CALIBRATION)
    text = engine_commands(recipe)
    assert text.count("--max_num_tokens 2048") == 3, "a line for each rank, and one for both together"
    assert "--use_fp8_context_fmha enable" in text
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_commands_read_the_checkpoint_of_their_own_choices_where_it_lies(tiny_folder: Path, tmp_path: Path) -> None:
    def recipe(quantization: str) -> Recipe:
        choices = {"runtime": "tensorrt_llm", "sku": "h100-sxm-80gb", "quantization": quantization}
        return Recipe(tiny_folder, profile(**choices), tmp_path, CALIBRATION)

    for quantization in ("none", "fp8_per_channel"):
        run(recipe(quantization), "quantize-llm")
    (slot,) = slots_of(recipe("none").decoder_folder)
    for quantization, name in (("none", f"slots/{slot.name}"), ("fp8_per_channel", "decoder")):
        one = recipe(quantization)
        found = dry_run_of(one, pipeline_of(one, "build-llm", dry_run=True), Surroundings())
        assert f"--checkpoint_dir /workspace/engines/mine/{name} " in found.commands[0].lines[-1]


@pytest.mark.slow
def test_a_data_free_checkpoint_says_in_its_manifest_what_it_gives_up(tiny_folder: Path, tmp_path: Path) -> None:
    recipe = Recipe(tiny_folder, profile(quantization="fp8_per_channel", samples=0), tmp_path)
    assert run(recipe, "quantize-llm") == {"quantize-llm": State.BUILT}
    manifest = json.loads((recipe.decoder_folder / "manifest.json").read_text())
    assert manifest["notes"]["data-free"]
    assert not [name for name in manifest["inputs"] if name.startswith("calibration")]
    assert quantize_llm(recipe).key == manifest["key"]


@pytest.mark.slow
def test_a_step_alone_takes_nothing_of_another_profile_or_checkpoint(calibrated: Recipe, tmp_path: Path) -> None:
    workspace = tmp_path / "work"
    shutil.copytree(calibrated.workspace, workspace)
    vision = calibrated.profile.vision
    for changed, step, words in (
        (vision.model_copy(update={"precision": "bf16"}), "build-vision", "precision was 'fp32', is 'bf16'"),
        (vision.model_copy(update={"precision": "bf16"}), "assemble", "vision is not what would be made now"),
        (vision.model_copy(update={"max_tiles_per_run": 7}), "assemble", "max_tiles_per_run was 16, is 7"),
    ):
        other = calibrated.profile.model_copy(update={"vision": changed})
        with pytest.raises(NvlmError) as refusal:
            run(Recipe(calibrated.checkpoint_folder, other, workspace, CALIBRATION), step)
        assert words in refusal.value.message
        assert "nvlm build" in refusal.value.hint


@pytest.mark.slow
@pytest.mark.parametrize("step", ["build-vision", "calibrate-llm", "quantize-llm", "assemble"])
def test_a_step_alone_takes_nothing_that_changed_since_it_was_made(
    calibrated: Recipe, tmp_path: Path, step: str
) -> None:
    recipe = Recipe(calibrated.checkpoint_folder, calibrated.profile, tmp_path / "work", CALIBRATION)
    shutil.copytree(calibrated.workspace, recipe.workspace)
    damaged = {
        "build-vision": recipe.vision_folder / "vision.onnx.data",
        "calibrate-llm": recipe.vision_onnx,
        "quantize-llm": recipe.calibration_result_folder / RESULT_NAME,
        "assemble": recipe.vision_engine_folder / "vision.onnx.data",
    }[step]
    run(recipe, "quantize-llm")
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(NvlmError, match=f"{damaged.name} changed"):
        run(recipe, step)
    damaged.unlink()
    with pytest.raises(NvlmError, match=f"{damaged.name} missing"):
        run(recipe, step)
    assert not recipe.repository.exists()
