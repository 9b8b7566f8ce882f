"""The repository of a GPU profile: engines of a fake trtllm-build (tests/llm/fakes), a real TensorRT-RTX plan.

Neither runs here: what is shown is that what was built lies where the server looks for it, and fits.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nvlm_deploy.cli.main import run
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.pipeline import State
from nvlm_deploy.recipe import STEP_NAMES, Recipe
from nvlm_deploy.steps.order import STEPS, pipeline_of
from nvlm_deploy.triton.repository import read_repository
from nvlm_deploy.triton.servable import require_servable
from nvlm_deploy.verification import verify_below

MACHINE = Path(__file__).parents[1] / "machine"
if str(MACHINE) not in sys.path:
    sys.path.insert(0, str(MACHINE))

from fake_nvidia_smi import FakeNvidiaSmi  # noqa: E402
from gpu_build import gpu_profile, two_l40s  # noqa: E402


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two_l40s(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def built(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recipe]:
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX builds the plan; its wheels are for x86-64 Linux")
    root = tmp_path_factory.mktemp("gpu")
    recipe = Recipe(tiny_folder, gpu_profile(), root / "work")
    with pytest.MonkeyPatch.context() as patched:
        two_l40s(root, patched)
        states = {step.name: state for step, state in pipeline_of(recipe).run()}
    assert states == dict.fromkeys(
        ("export-vision", "build-vision", "quantize-llm", "build-llm", "assemble"), State.BUILT
    )
    return recipe


@pytest.fixture
def copied(built: Recipe, tmp_path: Path) -> Path:
    shutil.copytree(built.repository, tmp_path / "repository")
    return tmp_path / "repository"


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_every_name_of_a_step_has_a_step_in_the_same_order() -> None:
    assert tuple(STEPS) == STEP_NAMES


@pytest.mark.slow
def test_a_gpu_profile_ends_in_a_repository_with_a_plan_and_an_engine_for_each_rank(built: Recipe) -> None:
    files = files_in(built.repository)
    assert {name for name in files if name.startswith("tensorrt_llm/")} == {
        "tensorrt_llm/config.pbtxt",
        "tensorrt_llm/1/config.json",
        "tensorrt_llm/1/rank0.engine",
        "tensorrt_llm/1/rank1.engine",
    }
    assert {"vision_encoder/1/vision.plan", "vision_encoder/1/model.py"} <= files
    assert not [name for name in files if name.endswith((".log", ".onnx", ".safetensors"))]


@pytest.mark.slow
def test_engines_and_plan_take_no_room_twice(built: Recipe) -> None:
    engine = built.repository / "tensorrt_llm" / "1" / "rank1.engine"
    plan = built.repository / "vision_encoder" / "1" / "vision.plan"
    assert engine.samefile(built.decoder_engine_folder / "rank1.engine")
    assert plan.samefile(built.vision_engine_folder / "vision.plan")


@pytest.mark.slow
def test_the_backend_is_told_what_the_engines_were_built_for_and_what_the_plan_says_fits(built: Recipe) -> None:
    decoder = next(config for config in read_repository(built.repository) if config.name == "tensorrt_llm")
    assert (decoder.backend, decoder.max_batch_size, decoder.decoupled) == ("tensorrtllm", 4, True)
    assert decoder.parameter("gpt_model_path") == "tensorrt_llm/1"
    assert (built.repository / "tensorrt_llm/1/config.json").is_file(), "the path is within the repository"
    assert decoder.parameter("max_tokens_in_paged_kv_cache") == str(4 * 512)
    assert decoder.parameter("enable_kv_cache_reuse") == "false", "the backend's own default is to reuse"


@pytest.mark.slow
def test_the_manifest_says_what_both_engines_are_bound_to(built: Recipe) -> None:
    manifest = json.loads((built.repository / "manifest.json").read_text())
    assert set(manifest["fingerprints"]) == {"build-vision", "build-llm"}
    assert manifest["fingerprints"]["build-llm"]["gpus"] == 2
    assert manifest["fingerprints"]["build-llm"]["gpu"] == "NVIDIA L40S"


@pytest.mark.slow
def test_a_moved_repository_is_whole_and_may_be_served_on_such_a_machine_only(
    copied: Path, machine: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert verify_below(copied).passed
    require_servable(copied)
    FakeNvidiaSmi(tmp_path / "other", monkeypatch).machine("H100", "H100")
    with pytest.raises(NvlmError, match="built with NVIDIA L40S, here NVIDIA H100"):
        require_servable(copied)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("build_config.max_batch_size", 8, "max_batch_size is 8, tensorrt_llm's max_batch_size is 4"),
        ("build_config.max_seq_len", 1024, "max_seq_len is 1024, preprocessing's max_seq_len is 512"),
        ("build_config.max_prompt_embedding_table_size", 64, "16 visual tokens are granted a request, 2 image"),
        ("pretrained_config.vocab_size", 999, "vocab_size is 999, the first visual token's id is"),
        ("pretrained_config.hidden_size", 128, "hidden_size is 128, the prompt table's width is 256"),
        ("pretrained_config.dtype", "float16", "dtype is TYPE_FP16, the prompt table's type is TYPE_BF16"),
        ("pretrained_config.logits_dtype", "float16", "context_logits's type is TYPE_FP32"),
        ("pretrained_config.mapping.world_size", 4, "world_size 4 wants rank0.engine, rank1.engine, rank2.engine"),
        ("build_config.max_batch_size", None, "is not what trtllm-build writes"),
    ],
)
def test_engines_of_another_build_are_refused_by_the_field_that_differs(
    copied: Path, field: str, value: object, words: str
) -> None:
    path = copied / "tensorrt_llm" / "1" / "config.json"
    document = json.loads(path.read_text())
    *sections, name = field.split(".")
    place = document
    for section in sections:
        place = place[section]
    place[name] = value
    path.unlink()  # a link to where it was built
    path.write_text(json.dumps(document))
    with pytest.raises(NvlmError) as refusal:
        read_repository(copied)
    assert words in refusal.value.message


@pytest.mark.slow
def test_prompts_in_pieces_want_engines_that_take_them(copied: Path) -> None:
    config = copied / "tensorrt_llm" / "config.pbtxt"
    text = config.read_text()
    before, after = text.split('key: "enable_chunked_context"', 1)
    config.write_text(before + 'key: "enable_chunked_context"' + after.replace('"false"', '"true"', 1))
    path = copied / "tensorrt_llm" / "1" / "config.json"
    document = json.loads(path.read_text())
    document["build_config"]["plugin_config"]["use_paged_context_fmha"] = False
    path.unlink()
    path.write_text(json.dumps(document))
    with pytest.raises(NvlmError, match="use_paged_context_fmha is off"):
        read_repository(copied)


@pytest.mark.slow
def test_engines_that_were_not_built_with_this_profile_are_not_assembled(
    built: Recipe, tmp_path: Path, machine: None
) -> None:
    shutil.copytree(built.workspace, tmp_path / "work")
    other = replace(built, profile=gpu_profile(max_batch_size=2), workspace=tmp_path / "work")
    with pytest.raises(NvlmError, match="decoder-engine is not what would be made now: limits was"):
        list(pipeline_of(other, "assemble").run())


def test_a_profile_without_room_for_one_sequence_is_refused_before_the_first_step(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: None
) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="the profile wants it")
    monkeypatch.setattr("nvlm_deploy.planning.memory.PROCESS_BYTES", 1 << 36)
    with pytest.raises(NvlmError, match=r"needs .* GiB on GPU 0 .*: no sequence of max_seq_len fits"):
        list(pipeline_of(Recipe(tiny_folder, gpu_profile(), tmp_path / "work")).run())
    assert not (tmp_path / "work").exists()


@pytest.mark.slow
def test_a_dry_run_of_serve_prints_the_commands_of_the_container(
    copied: Path, machine: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(["serve", str(copied), "--dry-run", "--grpc-port", "9001", "--json"])
    assert ended.value.code in (0, None)
    found = json.loads(capsys.readouterr().out)
    assert found["refused_here"] is None
    assert f" -v {copied}:/repository:ro " in found["container"]["start"]
    *_, folder, command = found["commands"]
    assert folder == "cd /repository"
    assert command.startswith("mpirun --allow-run-as-root -n 1 /opt/tritonserver/bin/tritonserver --model-repository=")
    assert command.count(" -n 1 ") == 2
    assert command.count("--grpc-port=9001") == 2
    assert str(copied) not in command


@pytest.mark.slow
def test_a_dry_run_of_serve_needs_no_gpu_and_says_that_it_would_be_refused(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(["serve", str(copied), "--dry-run"])
    assert ended.value.code in (0, None)
    lines = capsys.readouterr().out.splitlines()
    assert "would not start it on this machine: its engines run on NVIDIA L40S" in lines[1]
    assert [line.split()[0] for line in lines[3:]] == ["docker", "python3", "cd", "mpirun"]
