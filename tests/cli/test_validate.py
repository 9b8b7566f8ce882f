"""`nvlm validate` as a user types it; the two sides are stand-ins, the judgement is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

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


def exit_code(*arguments: str, verb: str = "accuracy") -> object:
    with pytest.raises(SystemExit) as ended:
        run(["validate", verb, *arguments])
    return ended.value.code


def compared(samples: Path, reference: str, candidate: str, *more: str) -> object:
    return exit_code(str(samples), "--samples", str(samples), "--reference-url", reference, "--url", candidate, *more)


@pytest.mark.usefixtures("servers")
@pytest.mark.needs("build")
def test_a_loss_that_is_within_the_bound_with_its_interval_holds(
    samples: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compared(samples, "wrong-0:1", "wrong-1:1", "--max-drop", "4") == 0
    output = capsys.readouterr().out
    assert "-1.0 points" in output
    assert "yes" in output


@pytest.mark.usefixtures("servers")
@pytest.mark.needs("build")
def test_a_loss_beyond_the_bound_with_its_interval_fails(samples: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compared(samples, "wrong-0:1", "wrong-9:1") == 1
    output = capsys.readouterr().out
    assert "NO" in output
    assert "undecided" not in output


@pytest.mark.usefixtures("servers")
@pytest.mark.needs("build")
@pytest.mark.parametrize(("limit", "needed"), [("12", "194"), ("40", "194")])
def test_so_few_questions_are_undecided_though_nothing_was_lost(
    limit: str, needed: str, samples: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compared(samples, "wrong-0:1", "wrong-0:1", "--limit", limit) == 1
    output = " ".join(capsys.readouterr().out.split())
    assert "yes" not in output
    assert f"undecided: accuracy lost, all tasks: after {limit} questions it may be" in output
    assert f"About {needed} questions decide" in output


@pytest.mark.usefixtures("servers")
@pytest.mark.needs("build")
def test_undecided_is_in_the_document_with_the_questions_that_are_needed(
    samples: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compared(samples, "wrong-0:1", "wrong-0:1", "--limit", "12", "--json") == 1
    (bar,) = json.loads(capsys.readouterr().out)["bars"]
    assert (bar["verdict"], bar["holds"], bar["n"], bar["n_needed"]) == ("undecided", False, 12, 194)
    assert bar["interval_95"] == pytest.approx([-14.0, 14.0], abs=0.05)


@pytest.mark.usefixtures("servers")
@pytest.mark.needs("build")
def test_json_is_one_document_with_both_models_and_the_verdict(
    samples: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compared(samples, "wrong-3:1", "wrong-5:1", "--limit", "50", "--json") == 1
    document = json.loads(capsys.readouterr().out)
    assert [model["accuracy"]["all"]["right"] for model in document["models"]] == [47, 45]
    assert document["difference"]["all"]["points"] == pytest.approx(-4)
    assert document["agreement"]["right"] == 48
    assert document["bars"][0]["holds"] is False


@pytest.mark.needs("build")
def test_samples_that_are_not_there_are_wrong_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(str(tmp_path), "--samples", str(tmp_path)) == 2
    assert "samples.jsonl" in capsys.readouterr().err


@pytest.fixture
def wrong_vision(exported_vision: Path, tmp_path: Path) -> Path:
    """The graph of `random_checkpoint` with GELU's approximation in block 2."""
    import onnx

    model = onnx.load(exported_vision, load_external_data=False)
    next(node for node in model.graph.node if "block.2.gelu" in node.output).attribute[0].s = b"tanh"
    shutil.copyfile(exported_vision.with_name("vision.onnx.data"), tmp_path / "vision.onnx.data")
    onnx.save(model, tmp_path / "vision.onnx")
    return tmp_path / "vision.onnx"


def numerics(checkpoint: Any, *more: str) -> object:
    return exit_code(str(checkpoint.folder), *more, verb="numerics")


def test_a_healthy_graph_is_exit_code_0_with_a_line_per_stage(
    random_checkpoint: Any, exported_vision: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert numerics(random_checkpoint, "--onnx", str(exported_vision)) == 0
    shown = capsys.readouterr()
    for stage in ("pixels", "patch_embedding", "block.0", "block.3", "pixel_shuffle", "embeddings"):
        assert stage in shown.out
    assert "fp32 graph: cosine 1.0000000 on 2 tiles" in shown.out
    assert "stages compared: 6" in shown.err


def test_the_table_is_80_columns_wide(
    random_checkpoint: Any, wrong_vision: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    numerics(random_checkpoint, "--onnx", str(wrong_vision))
    table = capsys.readouterr().out.partition("block 2: GELU")[0].splitlines()
    assert max(map(len, table)) <= 80
    assert not [line for line in table if "…" in line]
    assert [line.split()[0] for line in table if line.rstrip().endswith("NO")] == ["block.2"]


def test_a_wrong_graph_is_exit_code_1_with_the_bisections_sentence(
    random_checkpoint: Any, wrong_vision: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert numerics(random_checkpoint, "--onnx", str(wrong_vision)) == 1
    assert "block 2: GELU in its tanh approximation" in capsys.readouterr().out


def test_numerics_as_json_are_one_document(
    random_checkpoint: Any, wrong_vision: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert numerics(random_checkpoint, "--onnx", str(wrong_vision), "--tiles", "3", "--json") == 1
    document = json.loads(capsys.readouterr().out)
    assert (document["passed"], document["precision"], document["tiles"]) == (False, "fp32", 3)
    assert document["sentence"].startswith("block 2: GELU")
    assert len(document["end"]["per_tile"]["cosine"]) == 3
    assert [stage["stage"] for stage in document["stages"] if not stage["holds"]] == ["block.2"]


def test_the_samples_pictures_are_compared_instead_of_noise(
    random_checkpoint: Any, exported_vision: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heldout = Path(__file__).parents[1] / "models" / "heldout"
    cosines = []
    for samples in ([], ["--samples", str(heldout)]):
        assert numerics(random_checkpoint, "--onnx", str(exported_vision), "--tiles", "3", *samples, "--json") == 0
        document = json.loads(capsys.readouterr().out)
        assert document["tiles"] == 3
        cosines.append(document["end"]["per_tile"]["cosine"])
    assert cosines[0] != cosines[1]


def test_a_graph_that_was_not_built_is_wrong_input(
    random_checkpoint: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert numerics(random_checkpoint, "--workspace", str(tmp_path), "--json") == 2
    assert "no vision graph" in json.loads(capsys.readouterr().out)["error"]["message"]
