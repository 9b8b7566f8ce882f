"""A build does what is not done, keeps what is, and goes on after a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nvlm_deploy.artifacts import MANIFEST_NAME, read_manifest
from nvlm_deploy.errors import MachineError, NvlmError
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
