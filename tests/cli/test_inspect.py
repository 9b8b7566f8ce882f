"""`nvlm inspect` reads headers and says what is wrong with a checkpoint, by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from nvlm_deploy.checkpoint.reader import Checkpoint
from nvlm_deploy.cli.inspect import facts_of
from nvlm_deploy.cli.main import run
from nvlm_deploy.errors import NvlmError

# tests/conftest.py: the small model's shapes with random weights, in three shards
pytestmark = pytest.mark.usefixtures("random_checkpoint")


@pytest.fixture
def folder(random_checkpoint: Checkpoint, tmp_path: Path) -> Path:
    copy = tmp_path / "checkpoint"
    shutil.copytree(random_checkpoint.folder, copy)
    return copy


def exit_code_of(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        run(list(arguments))
    return int(exit_.value.code or 0)


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def test_it_prints_the_shapes_and_the_padded_heads(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of("inspect", str(folder), "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["vision spec"]["heads"] == 4
    assert facts["vision spec"]["padded_heads"] == 11
    assert facts["checkpoint"]["shards"] >= 3
    assert "CC-BY-NC-4.0" in facts["checkpoint"]["licence"]


def test_sizes_of_the_parts_add_up_to_the_checkpoint(folder: Path) -> None:
    facts = facts_of(folder)
    parts = ("vision_model", "projector", "language_model")
    assert sum(int(str(facts[part]["bytes"])) for part in parts) == Checkpoint.open(folder).size_bytes


def test_a_table_for_people_fits_80_columns(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert exit_code_of("inspect", str(folder)) == 0
    assert max(len(line) for line in capsys.readouterr().out.splitlines()) <= 80


def test_a_missing_shard_is_named(folder: Path) -> None:
    shard = first_shard(folder)
    shard.unlink()
    with pytest.raises(NvlmError, match=f"1 of . shards missing .*{shard.name}"):
        facts_of(folder)


def test_a_truncated_shard_is_named_with_both_sizes(folder: Path) -> None:
    shard = first_shard(folder)
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(NvlmError, match=f"{shard.name} .*truncated: .* bytes, expected"):
        facts_of(folder)


def test_a_tensor_of_the_wrong_shape_is_named(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit_config(folder, llm_config={**config["llm_config"], "intermediate_size": 400})
    with pytest.raises(NvlmError, match=r"has shape \[384, .*expected \[400, "):
        facts_of(folder)


def test_a_checkpoint_of_another_model_is_refused(folder: Path) -> None:
    edit_config(folder, architectures=["InternVLChatModel"])
    with pytest.raises(NvlmError, match="another model"):
        facts_of(folder)


@pytest.mark.parametrize("content", ["{", "[]", '{"architectures": ["NVLM_D"]}'])
def test_a_damaged_config_is_wrong_input_not_a_traceback(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    assert exit_code_of("inspect", str(folder)) == 2


def test_failure_is_one_json_document_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of("inspect", str(tmp_path / "nowhere"), "--json") == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert "nowhere" in error["message"]
    assert error["exit_code"] == 2


def test_a_tensor_of_a_type_that_holds_no_weights_is_named(folder: Path) -> None:
    shard = first_shard(folder)
    data = shard.read_bytes()
    shard.write_bytes(data.replace(b'"BF16"', b'"I16" ', 1))
    with pytest.raises(NvlmError, match="is I16, expected one of BF16"):
        facts_of(folder)
