"""`nvlm inspect` reads headers and says what is wrong with a checkpoint, by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

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


def edit(folder: Path, name: str, **changes: object) -> None:
    """Set keys of a settings file, which is made where there is none."""
    path = folder / name
    document = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**document, **changes}))


def inspected(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    """Exit code and the one JSON document."""
    code = exit_code_of("inspect", str(folder), "--json")
    return code, json.loads(capsys.readouterr().out)


def test_the_licence_is_the_folders_own_and_not_that_of_nvlm_d_72b(folder: Path) -> None:
    assert facts_of(folder)["checkpoint"]["licence"] == "not stated in the folder: ask whoever made the checkpoint"
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\nlicense: mit\n")
    (folder / "LICENSE.txt").write_text("Apache License")
    assert facts_of(folder)["checkpoint"]["licence"] == "apache-2.0 (README.md), see LICENSE.txt"


def test_every_file_of_a_build_is_listed(folder: Path) -> None:
    files = facts_of(folder)["files"]
    needed = {path.name for path in folder.iterdir()}
    assert {name for name, state in files.items() if state == "there"} == needed
    assert files["generation_config.json"] == "not there, not needed"


def test_a_missing_tokenizer_is_listed_and_ends_with_1(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "tokenizer.json").unlink()
    code, document = inspected(folder, capsys)
    assert code == 1
    assert document["files"]["tokenizer.json"] == "missing: `nvlm build` needs it"


def test_a_missing_shard_does_not_hide_a_missing_tokenizer(folder: Path) -> None:
    first_shard(folder).unlink()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(NvlmError, match="shards missing") as refusal:
        facts_of(folder)
    assert "tokenizer.json, which is missing too" in (refusal.value.hint or "")


def test_a_clean_checkpoint_has_no_section_of_settings(folder: Path, tiny_folder: Path) -> None:
    assert "settings" not in facts_of(folder)
    assert "settings" not in facts_of(tiny_folder)


def test_settings_are_grouped_by_what_becomes_of_them(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(folder, "generation_config.json", eos_token_id=[362, 364], temperature=0.7, top_p=0.8, do_sample=False)
    edit(folder, "config.json", novelty=1, _name_or_path="somewhere")
    code, document = inspected(folder, capsys)
    settings = document["settings"]
    assert code == 0
    assert settings["honoured"] == ["generation_config.json: eos_token_id = [362, 364]: each of them ends an answer"]
    (line,) = settings["neutralised"]
    assert line.startswith("generation_config.json: temperature = 0.7, top_p = 0.8: not obeyed: answers are greedy")
    assert settings["not known to nvlm"] == {"config.json": ["novelty"]}
    assert set(settings) == {"honoured", "neutralised", "not known to nvlm"}


def test_people_see_the_settings_too(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(folder, "generation_config.json", eos_token_id=364, repetition_penalty=1.05)
    assert exit_code_of("inspect", str(folder)) == 0
    assert "repetition_penalty = 1.05" in " ".join(capsys.readouterr().out.split())


def test_all_refused_settings_are_named_at_once_beside_the_others(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(folder, "config.json", use_llm_lora=16, ps_version="v1", pad2square=True)
    code, document = inspected(folder, capsys)
    assert code == 2
    assert "2 settings are refused" in document["error"]["message"]
    assert all(key in document["error"]["message"] for key in ("use_llm_lora is 16", "ps_version is 'v1'"))
    assert len(document["settings"]["refused"]) == 2
    assert "pad2square" in document["settings"]["neutralised"][0]


def test_a_tokenizer_that_a_build_would_refuse_is_refused(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    for token in tokenizer["added_tokens"]:
        token["single_word"] = True
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(NvlmError, match=r"tokenizer\.json makes \d+ tokens <\|im_start\|> of a prompt"):
        facts_of(folder)
