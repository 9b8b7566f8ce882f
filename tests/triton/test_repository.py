"""The assembled repository on disk."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.serving.settings import ServingSettings, spec_as_json, spec_from_json
from nvlm_deploy.triton.choices import ServingChoices
from nvlm_deploy.triton.repository import RepositorySources, read_repository, write_repository

PYTHON_MODELS = ("preprocessing", "vision_encoder", "tensorrt_llm", "postprocessing")


@pytest.fixture
def sources(tmp_path, tiny_spec, tokenizer_file) -> RepositorySources:
    """Artifacts that are files of the right names; nothing here loads them."""
    for name, files in {"vision": ["vision.onnx", "vision.onnx.data"], "decoder": ["config.json", "rank0.x"]}.items():
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_text(file)
    (tmp_path / "vision" / "manifest.json").write_text("{}")
    return RepositorySources(tmp_path / "vision", tmp_path / "decoder", tokenizer_file, tiny_spec)


@pytest.fixture
def folder(tmp_path, sources) -> Path:
    folder = tmp_path / "repository"
    folder.mkdir()
    write_repository(folder, sources, ServingChoices())
    return folder


def test_every_model_has_a_config_and_its_files_beside_one_import_line(folder) -> None:
    for name in PYTHON_MODELS:
        (line,) = (folder / name / "1" / "model.py").read_text().splitlines()
        assert line.startswith("from nvlm_deploy.serving.")
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"vision_encoder/1/vision.onnx", "vision_encoder/1/vision.onnx.data", "tensorrt_llm/1/rank0.x"} <= files
    assert "vision_encoder/1/manifest.json" not in files
    assert (folder / "nvlm" / "1").is_dir()


def test_the_decoders_weights_are_linked_not_copied(folder, sources) -> None:
    weights = folder / "tensorrt_llm" / "1" / "rank0.x"
    assert weights.samefile(sources.decoder / "rank0.x")


@pytest.mark.slow
def test_the_onnx_tools_read_the_graph_in_its_place(exported_vision, sources, tmp_path) -> None:
    """They refuse external data that has several hard links."""
    folder = tmp_path / "repository"
    write_repository(folder, replace(sources, vision=exported_vision.parent), ServingChoices())
    onnx.checker.check_model(str(folder / "vision_encoder" / "1" / "vision.onnx"))


def test_what_was_written_reads_back(folder) -> None:
    assert {config.name for config in read_repository(folder)} == {"nvlm", *PYTHON_MODELS}


def test_a_config_edited_by_hand_is_cross_checked_again(folder) -> None:
    config = folder / "vision_encoder" / "config.pbtxt"
    config.write_text(config.read_text().replace("TYPE_BF16", "TYPE_FP32"))
    with pytest.raises(NvlmError, match="TYPE_FP32"):
        read_repository(folder)


def test_a_model_in_the_wrong_folder_is_found(folder) -> None:
    (folder / "vision_encoder").rename(folder / "after")
    with pytest.raises(NvlmError, match="configures a model called vision_encoder"):
        read_repository(folder)


def test_any_other_folder_is_not_a_repository(tmp_path) -> None:
    with pytest.raises(NvlmError, match="has no model nvlm"):
        read_repository(tmp_path)


def test_a_plan_is_the_engine_where_there_is_no_graph(tmp_path, sources) -> None:
    for file in (tmp_path / "vision").glob("vision.onnx*"):
        file.unlink()
    (tmp_path / "vision" / "vision.plan").write_bytes(b"plan")
    (tmp_path / "vision" / "builder.log").write_text("log")
    folder = tmp_path / "repository"
    folder.mkdir()
    write_repository(folder, sources, ServingChoices(vision_runtime="tensorrt"))
    assert {file.name for file in (folder / "vision_encoder" / "1").iterdir()} == {"vision.plan", "model.py"}


def test_an_encoder_without_an_engine_is_named(tmp_path, sources) -> None:
    for file in (tmp_path / "vision").glob("vision.onnx*"):
        file.unlink()
    with pytest.raises(NvlmError, match=r"vision has no vision\.onnx or vision\.plan"):
        write_repository(tmp_path, sources, ServingChoices())


@pytest.mark.parametrize("part", ["decoder/config.json", "decoder/rank0.x"])
def test_a_missing_part_is_named(tmp_path, sources, part) -> None:
    (tmp_path / part).unlink()
    with pytest.raises(NvlmError, match=f"{Path(part).parent} has no {Path(part).name[:4]}"):
        write_repository(tmp_path / "r", sources, ServingChoices())


def test_the_spec_comes_back_from_json(tiny_spec) -> None:
    assert spec_from_json(spec_as_json(tiny_spec)) == tiny_spec
    with pytest.raises(NvlmError, match="is damaged"):
        spec_from_json("{}")


def settings(**parameters: str) -> ServingSettings:
    import json

    config = {"parameters": {key: {"string_value": value} for key, value in parameters.items()}}
    arguments = {"model_name": "m", "model_repository": "/r/m", "model_version": "1"}
    return ServingSettings({**arguments, "model_config": json.dumps(config)})


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("decoder", "layers", 10**9),
        ("decoder", "heads", 10**6),
        ("decoder", "kv_heads", 0),
        ("vision", "patch_size", -1),
        ("tiling", "tile_size", "448"),
        ("decoder", "norm_epsilon", float("nan")),
        ("prompt", "surprise", 1),
    ],
)
def test_a_spec_that_no_model_has_is_damaged(tiny_spec, section, name, value) -> None:
    document = json.loads(spec_as_json(tiny_spec))
    document[section][name] = value
    with pytest.raises(NvlmError, match=r"model_spec\.json is damaged"):
        spec_from_json(json.dumps(document))


def test_a_model_finds_its_files_in_its_version_folder() -> None:
    assert settings().folder == Path("/r/m/1")


def test_a_missing_or_wrong_parameter_is_named() -> None:
    with pytest.raises(NvlmError, match=r"m: config\.pbtxt has no parameter threads"):
        settings().integer("threads")
    with pytest.raises(NvlmError, match="parameter threads is 'two'"):
        settings(threads="two").integer("threads")
