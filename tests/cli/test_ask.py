"""`nvlm ask` as a user types it, where no server is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nvlm_deploy.cli.main import run

# port 9 is discard, on which nothing of ours listens
NOBODY = ["--url", "127.0.0.1:9"]


def exit_code(*arguments: str) -> object:
    with pytest.raises(SystemExit) as ended:
        run(["ask", *arguments])
    return ended.value.code


def test_without_a_server_it_fails_with_3_and_says_how_to_start_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("hello", *NOBODY) == 3
    output = capsys.readouterr()
    assert "no server answers at 127.0.0.1:9" in output.err
    assert "nvlm serve" in output.err
    assert output.out == ""


def test_a_failure_is_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("hello", *NOBODY, "--json") == 3
    problem = json.loads(capsys.readouterr().out)["error"]
    assert problem["exit_code"] == 3
    assert "127.0.0.1:9" in problem["message"]


def test_a_missing_image_is_wrong_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("hello", *NOBODY, "--image", str(tmp_path / "none.png")) == 2
    assert "none.png does not exist" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("arguments", [["--seed", "-1"], ["--max-tokens", "10000000000"]])
def test_a_number_out_of_range_is_wrong_input(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("hello", *NOBODY, *arguments) == 2
    assert "expected" in capsys.readouterr().err


def test_a_question_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(*NOBODY) == 2
    assert "question" in capsys.readouterr().err
