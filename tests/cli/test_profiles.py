"""`nvlm profiles`: this system, then runnable, fitting elsewhere, impossible; the same as JSON; 80 columns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nvlm_deploy.cli import main
from nvlm_deploy.machine import resources
from nvlm_deploy.machine.resources import Gpu, Machine


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def four_h200(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(900 << 30, tuple(Gpu("NVIDIA H200", "9.0", str(index)) for index in range(4)))
    monkeypatch.setattr(resources, "this_machine", lambda: machine)


def nvlm(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main.run(list(arguments))
    return int(exit_.value.code or 0)


@pytest.mark.usefixtures("four_h200")
def test_this_system_comes_first_then_the_verdicts_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert nvlm("profiles") == 0
    text = capsys.readouterr().out
    order = ["this system: 4 x NVIDIA H200 (SKU h200-141gb)", "runnable here", "fits elsewhere", "impossible"]
    places = [text.index(words) for words in order]
    assert places == sorted(places)
    runnable = text[places[1] : places[2]]
    assert "h200-141gb-latency-4gpu" in runnable
    assert "h200-141gb-throughput" in runnable
    assert "b200" not in runnable


@pytest.mark.usefixtures("four_h200")
def test_an_impossible_profile_says_what_it_needs_and_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    nvlm("profiles", "--json")
    document = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in document["profiles"]}
    row = rows["h100-sxm-80gb-throughput on 1"]
    assert row["verdict"] == "impossible"
    assert row["needed_for_one_sequence_bytes"] > row["visible_bytes"] == int(79.2 * 2**30)
    assert "79.2 visible" in row["reason"]
    assert document["system"]["sku"] == "h200-141gb"


@pytest.mark.usefixtures("four_h200")
def test_text_and_json_say_the_same_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    """In use with the whole KV cache where it fits; with one sequence's cache where it does not."""
    nvlm("profiles", "--json")
    for row in json.loads(capsys.readouterr().out)["profiles"]:
        if row["reason"].startswith("needs"):
            assert row["reason"].startswith(f"needs {row['needed_for_one_sequence_bytes'] / 2**30:.1f} GiB")
        else:
            assert row["reason"].startswith(
                f"{row['used_bytes'] / 2**30:.1f} of {row['visible_bytes'] / 2**30:.1f} GiB"
            )
            assert row["needed_for_one_sequence_bytes"] <= row["used_bytes"] <= row["visible_bytes"]


@pytest.mark.parametrize("columns", [20, 40, 60])
def test_a_narrower_terminal_gets_no_longer_lines(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert nvlm("profiles") == 0
    assert max(len(line) for line in capsys.readouterr().out.splitlines()) <= columns


def test_the_table_is_80_columns_wide_at_most(capsys: pytest.CaptureFixture[str]) -> None:
    assert nvlm("profiles") == 0
    assert max(len(line) for line in capsys.readouterr().out.splitlines()) <= 80


def test_the_small_model_runs_on_any_machine(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert nvlm("profiles", str(tiny_folder), "--json") == 0
    rows = json.loads(capsys.readouterr().out)["profiles"]
    assert {row["name"] for row in rows if row["verdict"] == "runnable here"} >= {"cpu", "cpu-bf16"}
    refused = next(row for row in rows if row["name"] == "h200-141gb-latency")
    assert (refused["verdict"], "2048 positions" in refused["reason"]) == ("impossible", True)


def test_a_folder_that_is_no_checkpoint_is_wrong_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert nvlm("profiles", str(tmp_path), "--json") == 2
    assert "config.json" in json.loads(capsys.readouterr().out)["error"]["message"]
