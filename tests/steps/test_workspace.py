"""A workspace that is not as a step wants it is said before anything is touched; half-written files are no result."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from nvlm_deploy.artifacts import digests
from nvlm_deploy.errors import MachineError, NvlmError
from nvlm_deploy.manifest import MANIFEST_NAME
from nvlm_deploy.pipeline import Pipeline, Step
from nvlm_deploy.profile import load_profile
from nvlm_deploy.recipe import Recipe
from nvlm_deploy.steps.order import pipeline_of


def make(folder: Path) -> Mapping[str, Any]:
    (folder / "result").write_text("made")
    return {}


def built(workspace: Path) -> Path:
    step = Step("quantize-llm", workspace / "engines" / "mine" / "decoder", {}, {}, make, resumes=True)
    list(Pipeline(workspace / "engines" / ".lock", {step.name: lambda: step}).run())
    return step.output


@pytest.mark.parametrize("kind", ["file", "link", "dangling link"])
def test_what_is_no_folder_of_ours_is_never_put_out_of_its_place(tmp_path: Path, kind: str) -> None:
    place, elsewhere = tmp_path / "engines" / "mine" / "decoder", tmp_path / "elsewhere"
    place.parent.mkdir(parents=True)
    if kind == "file":
        place.write_text("a thesis")
    else:
        place.symlink_to(elsewhere)
    if kind == "link":
        elsewhere.mkdir()
    with pytest.raises(NvlmError, match=f"decoder is a {kind.split()[-1]}, where a folder") as refusal:
        built(tmp_path)
    assert "not touched" in (refusal.value.hint or "")
    assert place.is_symlink() or place.read_text() == "a thesis"


@pytest.mark.parametrize("blocked", ["work", "work/engines"])
def test_a_workspace_that_cannot_be_written_to_is_said_with_a_mend(tmp_path: Path, blocked: str) -> None:
    (tmp_path / blocked).parent.mkdir(exist_ok=True)
    (tmp_path / blocked).write_text("a file")
    with pytest.raises(MachineError, match="engines cannot be written to: ") as refusal:
        built(tmp_path / "work")
    assert "--workspace" in (refusal.value.hint or "")


def test_what_a_kill_left_half_written_is_no_part_of_the_artifact(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def dying(folder: Path) -> Mapping[str, Any]:
        (folder / f".partial-17-{MANIFEST_NAME}").write_text("half")
        (folder / "unfinished").mkdir()
        (folder / "unfinished" / ".partial-17-progress.json").write_text("half")
        raise Killed

    output = tmp_path / "engines" / "calibrations" / "one"
    for maker in (dying, make):
        step = Step("calibrate-llm", output, {}, {}, maker, resumes=True)
        try:
            list(Pipeline(tmp_path / "engines" / ".lock", {step.name: lambda step=step: step}).run())
        except Killed:
            assert not output.exists()
    assert [name for name in digests(output) if "partial" in name] == []


def test_a_path_that_is_no_text_is_refused_before_anything_is_written(tiny_folder: Path, tmp_path: Path) -> None:
    workspace = Path(os.fsdecode(os.fsencode(tmp_path) + b"/w\xff"))
    with pytest.raises(NvlmError, match="is not UTF-8") as refusal:
        pipeline_of(Recipe(tiny_folder, load_profile("cpu-bf16"), workspace), "quantize-llm", dry_run=True)
    assert refusal.value.message.isascii()
    assert not workspace.exists()
