"""A build does what is not done, keeps what is, and goes on after a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nvlm_deploy import digest
from nvlm_deploy.artifacts import verify
from nvlm_deploy.checkpoint.resumable import OpenTensor, tensor_files
from nvlm_deploy.digest import sha256_of
from nvlm_deploy.errors import MachineError, NvlmError
from nvlm_deploy.manifest import MANIFEST_NAME, read_manifest
from nvlm_deploy.pipeline import Pipeline, State, Step, run_step


@pytest.fixture
def step(tmp_path: Path) -> Step:
    source = tmp_path / "source.txt"
    source.write_text("one")

    def make(folder: Path) -> dict[str, int]:
        (folder / "copy.txt").write_text(source.read_text())
        return {"letters": len(source.read_text())}

    return Step("copy", tmp_path / "engines" / "copy", {"source": source}, {"precision": "fp32"}, make)


def fresh(step: Step, **changes: object) -> Step:
    """The step as the next run of the program would make it: digests of its inputs are taken anew."""
    return replace(step, **changes)


def test_a_step_is_built_once_and_then_kept(step: Step) -> None:
    assert run_step(step)[0] is State.BUILT
    written = (step.output / MANIFEST_NAME).stat().st_mtime_ns
    assert run_step(fresh(step))[0] is State.UP_TO_DATE
    assert (step.output / MANIFEST_NAME).stat().st_mtime_ns == written


def test_the_manifest_names_inputs_outputs_settings_and_notes(step: Step) -> None:
    manifest = run_step(step)[1].manifest
    assert list(manifest.inputs) == ["source"]
    assert list(manifest.outputs) == ["copy.txt"]
    assert manifest.settings == {"precision": "fp32"}
    assert manifest.notes == {"letters": 3}


def test_another_input_setting_or_revision_builds_again(step: Step) -> None:
    run_step(step)
    assert run_step(fresh(step, settings={"precision": "bf16"}))[0] is State.BUILT
    assert run_step(fresh(step, revision=2))[0] is State.BUILT
    step.inputs["source"].write_text("two")
    assert run_step(fresh(step))[0] is State.BUILT
    assert (step.output / "copy.txt").read_text() == "two"


@pytest.mark.parametrize("damage", ["changed", "removed", "added"])
def test_a_damaged_artifact_is_built_again(step: Step, damage: str) -> None:
    run_step(step)
    copy = step.output / "copy.txt"
    if damage == "changed":
        copy.write_text("ono")
    elif damage == "removed":
        copy.unlink()
    else:
        (step.output / "stray.txt").write_text("?")
    assert run_step(fresh(step))[0] is State.BUILT
    assert [path.name for path in sorted(step.output.iterdir())] == ["copy.txt", MANIFEST_NAME]


def test_force_builds_what_is_up_to_date(step: Step) -> None:
    run_step(step)
    assert run_step(fresh(step), force=True)[0] is State.BUILT


def test_a_folder_of_somebody_else_is_refused_and_left_alone(step: Step) -> None:
    step.output.mkdir(parents=True)
    (step.output / "thesis.txt").write_text("precious")
    with pytest.raises(NvlmError, match="was not made by nvlm"):
        run_step(step, force=True)
    assert (step.output / "thesis.txt").read_text() == "precious"


def test_a_step_that_fails_leaves_the_former_artifact(step: Step) -> None:
    run_step(step)

    def explode(folder: Path) -> dict[str, int]:
        (folder / "half.txt").write_text("half")
        raise NvlmError("no")

    with pytest.raises(NvlmError, match="no"):
        run_step(fresh(step, make=explode), force=True)
    assert sorted(path.name for path in step.output.parent.iterdir()) == ["copy"]
    assert run_step(fresh(step))[0] is State.UP_TO_DATE


def pipeline_of(*steps: Step) -> Pipeline:
    return Pipeline(steps[0].output.parent / ".lock", {step.name: (lambda step=step: step) for step in steps})


def test_a_later_step_is_planned_stale_when_an_earlier_one_is(step: Step) -> None:
    second = replace(step, name="second", output=step.output.with_name("second"), inputs={"copy": step.output})
    assert dict(pipeline_of(step, second).plan()) == {"copy": State.TO_BUILD, "second": State.TO_BUILD}
    assert not step.output.exists()
    assert [state for _, state in pipeline_of(step, second).run()] == [State.BUILT, State.BUILT]
    assert dict(pipeline_of(fresh(step), fresh(second)).plan()) == {
        "copy": State.UP_TO_DATE,
        "second": State.UP_TO_DATE,
    }


def test_two_builds_in_one_workspace_do_not_mix(step: Step) -> None:
    running = pipeline_of(step).run()
    next(running)
    with pytest.raises(MachineError, match="another build is running"):
        next(pipeline_of(fresh(step)).run())
    running.close()
    assert next(pipeline_of(fresh(step)).run())[1] is State.UP_TO_DATE


KILLED_WHILE_BUILDING = """
import os, signal, sys
from pathlib import Path
from nvlm_deploy.pipeline import Pipeline, Step

output = Path(sys.argv[1])

def make(folder):
    (folder / "half.txt").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)

step = Step("copy", output, {"source": output.parents[1] / "source.txt"}, {"precision": "fp32"}, make)
list(Pipeline(output.parent / ".lock", {"copy": lambda: step}).run())
"""


def test_a_build_killed_with_sigkill_leaves_nothing_that_looks_finished_and_runs_again(step: Step) -> None:
    command = [sys.executable, "-c", KILLED_WHILE_BUILDING, str(step.output)]
    killed = subprocess.run(command, check=False, env=os.environ)
    assert killed.returncode == -signal.SIGKILL
    assert not step.output.exists()
    assert [state for _, state in pipeline_of(step).run()] == [State.BUILT]
    assert sorted(path.name for path in step.output.parent.iterdir()) == [".lock", "copy"]
    assert read_manifest(step.output).kind == "copy"


class Killed(BaseException):
    """Ends a run as a kill does: nothing catches it."""


def die(*_: object) -> None:
    raise Killed


@pytest.fixture
def streamed(step: Step) -> tuple[Step, list[str]]:
    """A step that resumes and streams tensors into two files, and the names of those that it wrote."""
    values = {"a": torch.arange(40.0), "b": torch.arange(5.0), "c": torch.zeros(0)}
    headers = {name: {key: ("F32", tuple(value.shape)) for key, value in values.items()} for name in ("one", "two")}
    written: list[str] = []

    def make(folder: Path) -> dict[str, int]:
        with tensor_files(folder, headers, identity="x") as files:
            for file, name in [
                (file, name) for file in headers for name in values if not files.is_finished(file, name)
            ]:
                with files.tensor(file, name) as tensor:
                    tensor.append(values[name])
                written.append(f"{file}.{name}")
        (folder / "small.json").write_text("{}")
        return {}

    return replace(step, make=make, resumes=True), written


@pytest.mark.parametrize(
    ("owner", "moment"),
    [
        ("nvlm_deploy.checkpoint.resumable.read_back", "while what was written is read back"),
        ("nvlm_deploy.pipeline.digests", "while the outputs are hashed"),
        ("nvlm_deploy.pipeline.write_manifest", "before the manifest"),
        ("nvlm_deploy.artifacts._swap", "before the folder is in its place"),
    ],
)
def test_a_run_killed_when_all_is_written_writes_nothing_again(
    streamed: tuple[Step, list[str]], monkeypatch: pytest.MonkeyPatch, owner: str, moment: str
) -> None:
    step, written = streamed
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(owner, die)
        run_step(step)
    assert len(written) == 6
    assert run_step(fresh(step))[0] is State.BUILT
    assert len(written) == 6, moment
    assert sorted(path.name for path in step.output.iterdir()) == [MANIFEST_NAME, "one", "small.json", "two"]
    assert verify(step.output).manifest.outputs["one"] == sha256_of(step.output / "one")


def test_a_run_killed_among_the_tensors_ends_with_the_right_digests(
    streamed: tuple[Step, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    step, written = streamed
    honest = OpenTensor.append

    def dying(self: OpenTensor, values: torch.Tensor) -> None:
        if len(written) == 4:
            raise Killed
        honest(self, values)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(OpenTensor, "append", dying)
        run_step(step)
    run_step(fresh(step))
    assert written == ["one.a", "one.b", "one.c", "two.a", "two.b", "two.c"]
    outputs = verify(step.output).manifest.outputs
    assert {name: sha256_of(step.output / name) for name in ("one", "two")} == {
        name: outputs[name] for name in ("one", "two")
    }


def test_a_run_killed_between_the_two_renames_of_the_swap_is_finished_by_the_next(
    streamed: tuple[Step, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    step, _ = streamed
    run_step(step)
    other = fresh(step, settings={"precision": "bf16"})
    honest = Path.rename

    def dying(self: Path, target: Path) -> Path:
        if target == step.output:
            raise Killed
        return honest(self, target)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Path, "rename", dying)
        run_step(other)
    assert not step.output.exists()
    made_again = fresh(other, make=die)
    assert run_step(made_again)[0] is State.BUILT
    assert verify(step.output).manifest.key == made_again.key
    assert sorted(path.name for path in step.output.parent.iterdir()) == [step.output.name, "slots"]
    assert run_step(fresh(step, make=die))[0] is State.UP_TO_DATE, "the former one was set aside, not lost"


def test_a_large_output_is_read_once_after_it_is_written_and_not_by_the_next_step(
    streamed: tuple[Step, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    step, _ = streamed
    read: list[str] = []
    honest = digest.sha256_of
    monkeypatch.setattr(digest, "sha256_of", lambda path: read.append(path.name) or honest(path))
    run_step(step)
    replace(step, name="next", inputs={"streamed": step.output}).key  # noqa: B018  # looks at its inputs
    assert "source.txt" in read
    assert {"one", "two"}.isdisjoint(read)


def test_a_byte_that_changes_behind_the_pass_that_hashed_it_is_found_by_the_next_step(
    streamed: tuple[Step, list[str]],
) -> None:
    step, _ = streamed
    run_step(step)
    with (step.output / "two").open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"?")
    with pytest.raises(NvlmError, match="two changed"):
        replace(step, name="next", inputs={"streamed": step.output}).key  # noqa: B018
