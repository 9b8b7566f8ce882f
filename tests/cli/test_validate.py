"""`nvlm validate` as a user types it; the two sides are stand-ins, the judgement is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nvlm_deploy.cli.main import run
from nvlm_deploy.samples import Sample, write_samples
from nvlm_deploy.validate.accuracy import Questions
from nvlm_deploy.validate.tasks import Scored


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    write_samples(tmp_path, [Sample(question=f"q{number}", answer=str(number), task="text") for number in range(100)])
    return tmp_path


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> None:
    """`wrong-N:1` answers the first N questions wrong."""

    def to_server(questions: Questions, url: str) -> list[Scored]:
        wrong = int(url.removeprefix("wrong-").removesuffix(":1"))
        return [
            Scored(sample, "no" if number < wrong else sample.answer) for number, sample in enumerate(questions.samples)
        ]

    monkeypatch.setattr(Questions, "to_server", to_server)


def exit_code(*arguments: str) -> object:
    with pytest.raises(SystemExit) as ended:
        run(["validate", "accuracy", *arguments])
    return ended.value.code


def compared(samples: Path, reference: str, candidate: str, *more: str) -> object:
    return exit_code(str(samples), "--samples", str(samples), "--reference-url", reference, "--url", candidate, *more)


@pytest.mark.usefixtures("servers")
def test_one_point_less_is_allowed(samples: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compared(samples, "wrong-0:1", "wrong-1:1") == 0
    output = capsys.readouterr().out
    assert "-1.0 points" in output
    assert "yes" in output


@pytest.mark.usefixtures("servers")
def test_two_points_less_is_exit_code_1(samples: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compared(samples, "wrong-0:1", "wrong-2:1") == 1
    assert "NO" in capsys.readouterr().out


@pytest.mark.usefixtures("servers")
def test_the_bound_can_be_chosen(samples: Path) -> None:
    assert compared(samples, "wrong-0:1", "wrong-2:1", "--max-drop", "2") == 0


@pytest.mark.usefixtures("servers")
def test_json_is_one_document_with_both_models_and_the_verdict(
    samples: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compared(samples, "wrong-3:1", "wrong-5:1", "--limit", "50", "--json") == 1
    document = json.loads(capsys.readouterr().out)
    assert [model["accuracy"]["all"]["right"] for model in document["models"]] == [47, 45]
    assert document["difference"]["all"]["points"] == pytest.approx(-4)
    assert document["agreement"]["right"] == 48
    assert document["bars"][0]["holds"] is False


def test_samples_that_are_not_there_are_wrong_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(str(tmp_path), "--samples", str(tmp_path)) == 2
    assert "samples.jsonl" in capsys.readouterr().err
