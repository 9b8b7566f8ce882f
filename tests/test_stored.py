"""`nvlm artifacts`: what a workspace stores is listed; a current artifact is never removed, nor any during a build."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from nvlm_deploy.cli.main import run
from nvlm_deploy.pipeline import Pipeline, State, Step
from nvlm_deploy.verification import verify_below
from nvlm_deploy.workspace import Status, stored_artifacts


class Killed(BaseException):
    """Ends a run as a kill does."""


def steps(workspace: Path, calibration: Path, *, dies: bool = False) -> Pipeline:
    """A calibration, what is made of it, and a repository with links to that."""
    engines = workspace / "engines"
    scales, decoder = engines / "calibrations" / "00ff", engines / "mine" / "decoder"

    def calibrate(folder: Path) -> Mapping[str, Any]:
        (folder / "calibration.json").write_text((calibration / "samples.jsonl").read_text())
        if dies:
            raise Killed
        return {}

    def quantize(folder: Path) -> Mapping[str, Any]:
        (folder / "rank0.safetensors").write_text((scales / "calibration.json").read_text() * 1000)
        return {}

    def assemble(folder: Path) -> Mapping[str, Any]:
        (folder / "rank0.safetensors").hardlink_to(decoder / "rank0.safetensors")
        return {}

    samples = {"calibration samples.jsonl": calibration / "samples.jsonl"}
    makers = {
        "calibrate-llm": lambda: Step("calibrate-llm", scales, samples, {"samples": 4}, calibrate, resumes=True),
        "quantize-llm": lambda: Step("quantize-llm", decoder, {"calibration": scales}, {}, quantize, resumes=True),
        "assemble": lambda: Step(
            "assemble", workspace / "triton_repo" / "mine", {"decoder": decoder}, {}, assemble, is_cheap=True
        ),
    }
    return Pipeline(engines / ".lock", makers)


@pytest.fixture
def lists(tmp_path: Path) -> list[Path]:
    folders = [tmp_path / f"list{number}" for number in range(3)]
    for folder in folders:
        folder.mkdir()
        (folder / "samples.jsonl").write_text(f"{folder.name}\n")
    return folders


@pytest.fixture
def workspace(tmp_path: Path, lists: list[Path]) -> Path:
    """Built with the first list, then with the second; killed with the third."""
    folder = tmp_path / "work"
    list(steps(folder, lists[0]).run())
    list(steps(folder, lists[1]).run())
    with pytest.raises(Killed):
        list(steps(folder, lists[2], dies=True).run())
    return folder


def nvlm(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run(["artifacts", *map(str, words)])
    said = capsys.readouterr()
    return int(end.value.code or 0), said.out + said.err


def names(workspace: Path, status: Status) -> list[str]:
    return [one.name for one in stored_artifacts(workspace) if one.status is status]


CURRENT = ["engines/calibrations/00ff", "engines/mine/decoder", "triton_repo/mine"]


def test_the_list_says_what_each_was_made_of_how_large_and_how_old(
    workspace: Path, lists: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = nvlm(capsys, "list", workspace, "--json")
    assert code == 0
    found = {one["name"]: one for one in json.loads(text)["artifacts"]}
    assert [name for name, one in found.items() if one["status"] == "current"] == CURRENT
    former = next(one for name, one in found.items() if name.startswith("engines/calibrations/slots/00ff-"))
    assert former["size_bytes"] > len("list0\n")
    assert former["made_of"][0].startswith(f"calibration list {lists[0]} (1 files, ")
    assert former["differs"] == ["another calibration list"]
    assert 0 <= former["age_s"] < 600
    (unfinished,) = [one for one in found.values() if one["status"] == "unfinished"]
    assert unfinished["kind"] == "calibrate-llm"
    assert unfinished["made_of"][0].startswith(f"calibration list {lists[2]} ")
    code, text = nvlm(capsys, "list", workspace)
    assert code == 0
    assert all(name in text for name in found)
    assert text.splitlines()[-1].startswith("3 current, ")
    assert max(map(len, text.splitlines())) <= max(80, *(len(str(folder)) + 40 for folder in lists))


def test_an_interrupted_calibration_outlives_a_run_with_another_list(workspace: Path, lists: list[Path]) -> None:
    list(steps(workspace, lists[0]).run())
    assert len(names(workspace, Status.UNFINISHED)) == 1
    states = {step.name: state for step, state in steps(workspace, lists[2]).run()}
    assert states["calibrate-llm"] is State.BUILT
    assert not names(workspace, Status.UNFINISHED)


@pytest.mark.parametrize("words", [["--dry-run"], []])
def test_nothing_is_removed_unless_it_is_said(
    workspace: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(workspace.rglob("*"))
    code, text = nvlm(capsys, "prune", workspace, *words)
    assert code == (0 if words else 2)
    assert all(name in " ".join(text.split()) for name in names(workspace, Status.SET_ASIDE))
    assert "--yes" in text or words
    assert sorted(workspace.rglob("*")) == before


def test_pruning_removes_what_is_set_aside_and_keeps_what_is_current_or_unfinished(
    workspace: Path, lists: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(names(workspace, Status.SET_ASIDE)) == 2
    assert nvlm(capsys, "prune", workspace, "--yes")[0] == 0
    assert names(workspace, Status.SET_ASIDE) == []
    assert names(workspace, Status.CURRENT) == CURRENT
    assert len(names(workspace, Status.UNFINISHED)) == 1
    assert not list(workspace.rglob("slots"))
    assert [state for _, state in steps(workspace, lists[1]).run()] == [State.UP_TO_DATE] * 3
    assert nvlm(capsys, "prune", workspace, "--yes", "--unfinished")[0] == 0
    assert names(workspace, Status.UNFINISHED) == []
    assert nvlm(capsys, "prune", workspace) == (0, "nothing to remove\n")


@pytest.mark.parametrize("name", CURRENT)
def test_a_current_artifact_is_never_removed(workspace: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = nvlm(capsys, "prune", workspace, "--yes", "--select", name)
    assert code == 2
    assert f"{name} is current" in text
    assert names(workspace, Status.CURRENT) == CURRENT


def test_one_is_removed_by_its_name_and_no_other(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = names(workspace, Status.SET_ASIDE)
    assert nvlm(capsys, "prune", workspace, "--select", second)[0] == 0
    assert names(workspace, Status.SET_ASIDE) == [first]
    code, text = nvlm(capsys, "prune", workspace, "--select", second)
    assert code == 2
    assert "no stored artifact" in text


def test_what_a_current_artifact_was_made_of_is_removed_by_its_name_alone(
    workspace: Path, lists: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Two profiles, two lists: the calibrations of both are of use, only one of them is at its place."""
    list(steps(workspace, lists[2]).run())
    scales = steps(workspace, lists[0]).makers["calibrate-llm"]
    list(Pipeline(workspace / "engines" / ".lock", {"calibrate-llm": scales}).run())
    used = next(one for one in stored_artifacts(workspace) if one.used_by == ("engines/mine/decoder",))
    assert used.status is Status.SET_ASIDE
    assert nvlm(capsys, "prune", workspace, "--yes")[0] == 0
    assert names(workspace, Status.SET_ASIDE) == [used.name]
    assert nvlm(capsys, "prune", workspace, "--select", used.name)[0] == 0
    assert names(workspace, Status.SET_ASIDE) == []


def test_only_those_of_some_age_are_removed(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert nvlm(capsys, "prune", workspace, "--yes", "--older-than-days", "1") == (0, "nothing to remove\n")
    assert len(names(workspace, Status.SET_ASIDE)) == 2


def test_nothing_is_removed_while_a_build_runs(
    workspace: Path, lists: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    running = steps(workspace, lists[1]).run()
    next(running)
    code, text = nvlm(capsys, "prune", workspace, "--yes")
    assert code == 3
    assert "another build is running" in text
    running.close()
    assert nvlm(capsys, "prune", workspace, "--yes")[0] == 0


def test_files_that_a_repository_links_to_are_not_counted_as_freed(workspace: Path, lists: list[Path]) -> None:
    by_name = {one.name: one for one in stored_artifacts(workspace)}
    decoder = by_name["engines/mine/decoder"]
    linked = (workspace / "engines/mine/decoder/rank0.safetensors").stat().st_size
    assert decoder.size_bytes - decoder.freed_bytes == linked


def test_what_a_killed_removal_left_is_cleared_and_never_taken_for_an_artifact(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slot = workspace / names(workspace, Status.SET_ASIDE)[0]
    slot.rename(slot.with_name(f".partial-{os.getpid()}-{slot.name}"))
    assert len(names(workspace, Status.SET_ASIDE)) == 1
    assert nvlm(capsys, "prune", workspace, "--yes")[0] == 0
    assert not list(workspace.rglob("slots"))


def test_a_folder_that_is_no_workspace_is_said_and_nothing_is_made_in_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for verb in ("list", "prune"):
        code, text = nvlm(capsys, verb, tmp_path)
        assert code == 2
        assert "is no workspace" in " ".join(text.split())
    assert list(tmp_path.iterdir()) == []


def test_a_list_that_changed_since_is_no_fault_of_what_is_set_aside(workspace: Path, lists: list[Path]) -> None:
    (lists[0] / "samples.jsonl").write_text("other\n")
    assert verify_below(workspace).passed
    (lists[1] / "samples.jsonl").write_text("other\n")
    assert not verify_below(workspace).passed


def test_a_damaged_artifact_is_listed_as_that(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workspace / "engines/mine/decoder/manifest.json").write_text("{")
    code, text = nvlm(capsys, "list", workspace)
    assert code == 0
    assert "current, damaged, " in text
