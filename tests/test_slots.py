"""No finished result is lost to a build with other inputs or choices, whenever a run is killed."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvlm_deploy.artifacts import begun_below, verify
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.manifest import MANIFEST_NAME
from nvlm_deploy.pipeline import Pipeline, State, Step, run_step
from nvlm_deploy.slots import slots_of


class Killed(BaseException):
    """Ends a run as a kill does: nothing catches it."""


class Maker:
    """A step whose work is two files; `made` counts how often each file of each content was written."""

    def __init__(self, root: Path, *, resumes: bool = True) -> None:
        self.output, self.resumes, self.made = root / "engines" / "mine" / "decoder", resumes, dict[str, int]()

    def step(self, choice: str, *, dies: bool = False) -> Step:
        def make(folder: Path) -> Mapping[str, Any]:
            for part in ("first", "second"):
                if not (folder / part).exists():
                    name = f"{choice} {part}"
                    self.made[name] = self.made.get(name, 0) + 1
                    (folder / part).write_text(name)
                if dies:
                    raise Killed
            return {}

        return Step("quantize-llm", self.output, {}, {"choice": choice}, make, resumes=self.resumes)


RUNS = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["whole", "in make", 1, 2, 3])), max_size=12)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(RUNS)
def test_whatever_was_built_in_whatever_order_nothing_is_made_twice(runs: list[tuple[str, str | int]]) -> None:
    """A number is the rename before which the run is killed: finished folders move by renames alone."""
    honest = Path.rename
    with tempfile.TemporaryDirectory() as folder:
        maker = Maker(Path(folder))
        for choice, end in runs:
            left = [end if isinstance(end, int) else 99]

            def dying(self: Path, target: Path, left: list[int] = left) -> Path:
                left[0] -= 1
                if left[0] == 0:
                    raise Killed
                return honest(self, target)

            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(Path, "rename", dying)
                try:
                    run_step(maker.step(choice, dies=end == "in make"))
                    assert verify(maker.output).manifest.settings == {"choice": choice}
                except Killed:
                    assert end != "whole"
        for choice in sorted({choice for choice, _ in runs}):
            run_step(maker.step(choice))
            assert (maker.output / "second").read_text() == f"{choice} second"
        assert set(maker.made.values()) <= {1}, "the work of a finished or interrupted run was done again"
        assert not begun_below(maker.output.parent)
        assert len(slots_of(maker.output)) == max(0, len({choice for choice, _ in runs}) - 1)


def test_a_former_choice_is_up_to_date_at_once_and_the_other_is_set_aside(tmp_path: Path) -> None:
    maker = Maker(tmp_path)
    run_step(maker.step("one"))
    assert run_step(maker.step("two"))[0] is State.BUILT
    (slot,) = slots_of(maker.output)
    assert slot.name.startswith("decoder-")
    assert slot.name.removeprefix("decoder-") == maker.step("one").key[:12]
    assert run_step(maker.step("one"))[0] is State.UP_TO_DATE
    assert [path.name for path in slots_of(maker.output)] == [f"decoder-{maker.step('two').key[:12]}"]


def test_what_takes_no_more_than_copying_is_replaced(tmp_path: Path) -> None:
    maker = Maker(tmp_path, resumes=False)
    run_step(replace(maker.step("one"), is_cheap=True))
    run_step(replace(maker.step("two"), is_cheap=True))
    assert [path.name for path in maker.output.parent.iterdir()] == ["decoder"]


def test_an_artifact_that_is_damaged_is_set_aside_too_by_another_choice(tmp_path: Path) -> None:
    maker = Maker(tmp_path)
    for content in ("one", "two"):
        run_step(maker.step(content))
        (maker.output / MANIFEST_NAME).write_text("{")
    run_step(maker.step("three"))
    assert {(slot / "first").read_text() for slot in slots_of(maker.output)} == {"one first", "two first"}


def test_a_damaged_slot_is_not_taken_for_the_result(tmp_path: Path) -> None:
    maker = Maker(tmp_path)
    run_step(maker.step("one"))
    run_step(maker.step("two"))
    (slots_of(maker.output)[0] / "first").write_text("?")
    assert run_step(maker.step("one"))[0] is State.BUILT
    assert (maker.output / "first").read_text() == "one first"


def test_building_by_force_replaces_the_same_content_alone(tmp_path: Path) -> None:
    maker = Maker(tmp_path)
    for choice in ("one", "two"):
        run_step(maker.step(choice))
    assert run_step(maker.step("one"), force=True)[0] is State.BUILT
    assert [path.name for path in slots_of(maker.output)] == [f"decoder-{maker.step('two').key[:12]}"]


def test_a_slot_is_told_from_that_of_a_place_with_a_longer_name(tmp_path: Path) -> None:
    short = Maker(tmp_path)
    long = Maker(tmp_path)
    long.output = short.output.with_name("decoder-engine")
    for maker in (short, long):
        for choice in ("one", "two"):
            run_step(maker.step(choice))
    assert [len(slots_of(maker.output)) for maker in (short, long)] == [1, 1]


def chain(maker: Maker, choice: str) -> dict[str, Any]:
    """A step and one that reads it."""

    def engine(folder: Path) -> Mapping[str, Any]:
        (folder / "engine").write_text((maker.output / "first").read_text())
        return {}

    second = Step("build-llm", maker.output.with_name("decoder-engine"), {"decoder": maker.output}, {}, engine)
    return {"quantize-llm": lambda: maker.step(choice), "build-llm": lambda: second}


def test_a_dry_run_finds_what_is_set_aside_and_moves_nothing(tmp_path: Path) -> None:
    maker = Maker(tmp_path)
    lock = tmp_path / "engines" / ".lock"
    for choice in ("one", "two"):
        list(Pipeline(lock, chain(maker, choice)).run())
    before = sorted(tmp_path.rglob("*"))
    assert dict(Pipeline(lock, chain(maker, "one")).plan()) == dict.fromkeys(
        ("quantize-llm", "build-llm"), State.UP_TO_DATE
    )
    assert dict(Pipeline(lock, chain(maker, "three")).plan()) == dict.fromkeys(
        ("quantize-llm", "build-llm"), State.TO_BUILD
    )
    assert sorted(tmp_path.rglob("*")) == before
    assert [state for _, state in Pipeline(lock, chain(maker, "one")).run()] == [State.UP_TO_DATE] * 2
    assert (maker.output.with_name("decoder-engine") / "engine").read_text() == "one first"


def test_a_step_alone_reads_the_slot_of_its_own_choices(tmp_path: Path) -> None:
    maker = Maker(tmp_path)
    lock = tmp_path / "engines" / ".lock"
    for choice in ("one", "two"):
        list(Pipeline(lock, {"quantize-llm": chain(maker, choice)["quantize-llm"]}).run())
    makers = chain(maker, "one")
    alone = Pipeline(lock, {"build-llm": makers["build-llm"]}, before={"quantize-llm": makers["quantize-llm"]})
    assert [state for _, state in alone.run()] == [State.BUILT]
    assert (maker.output.with_name("decoder-engine") / "engine").read_text() == "one first"
    other = replace(alone, before={"quantize-llm": chain(maker, "never")["quantize-llm"]})
    with pytest.raises(NvlmError, match="choice was 'one', is 'never'"):
        list(other.run())
