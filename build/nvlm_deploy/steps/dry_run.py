"""What a build would do: each step with what it reads and writes, and the commands of those that a container runs.

Needs no tool and no heavy library: it is read on another machine than the one that builds.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from nvlm_deploy.container import Container, Mount, Package, absolute, folder_mount
from nvlm_deploy.llm.engine import ONE_RANK_PROGRAM, BuildPlaces, dry_run, plan_engines
from nvlm_deploy.llm.engine_tool import CONTAINER_IMAGE, NEWEST
from nvlm_deploy.pipeline import Pipeline, Planned, Step
from nvlm_deploy.recipe import Recipe
from nvlm_deploy.sku import TENSORRT, TENSORRT_LLM
from nvlm_deploy.steps.decoder import engine_settings
from nvlm_deploy.verification import CALIBRATION_INPUT

# engines of pasted commands have no manifest: they must not lie where `nvlm build` puts those that it vouches for
BY_HAND = "by-hand"
_INSTALLED_FOR_GATE = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class Surroundings:
    """What a recipe does not know of the command line: the profile's file, and the container's image."""

    profile_file: Path | None = None
    image: str = CONTAINER_IMAGE


@dataclass(frozen=True)
class StepCommands:
    """What one step runs inside the container: itself; and, where there is one, the outside tool by hand."""

    step: str
    itself: tuple[str, ...]
    by_hand: tuple[str, ...] = ()

    @property
    def lines(self) -> list[str]:
        """Everything to paste, without remarks."""
        return [line for line in (*self.itself, *self.by_hand) if not line.startswith("#")]


@dataclass(frozen=True)
class DryRun:
    """The steps, and the commands; `start` opens a shell in the container that the commands are for."""

    recipe: Recipe
    planned: Sequence[Planned]
    image: str
    start: str
    commands: Sequence[StepCommands]

    def as_json(self) -> dict[str, Any]:
        document: dict[str, Any] = {
            "profile": self.recipe.profile.name,
            "dry_run": True,
            "steps": [self._row(planned) for planned in self.planned],
        }
        if self.commands:
            document["container"] = {"image": self.image, "start": self.start}
            document["commands"] = {one.step: one.lines for one in self.commands}
        return document

    def _row(self, planned: Planned) -> dict[str, Any]:
        step = planned.step
        row = {"step": step.name, "state": str(planned.state), "reads": [*_reads(planned, self.recipe)]}
        return row | {"writes": str(step.output), "found": None if planned.found is None else str(planned.found)}

    @property
    def lines(self) -> Iterator[str]:
        """For people; each command is one line."""
        for planned in self.planned:
            row = self._row(planned)
            yield f"{row['step']:14} {row['state']}"
            yield from (f"    reads   {one}" for one in row["reads"])
            yield f"    writes  {row['writes']}"
            if planned.found is not None and planned.found != planned.step.output:
                yield f"    takes   {planned.found}, made before"
        if not self.commands:
            return
        yield ""
        yield f"# a shell in the container of TensorRT-LLM {NEWEST.name}, on a machine with the profile's GPU"
        yield "# (--container-image: the image as your registry calls it)"
        yield self.start
        for one in self.commands:
            yield f"# inside it, {one.step}:"
            yield from one.itself
            if one.by_hand:
                yield "# or by hand what it runs, without its logs, its comparison and its manifest:"
                yield from one.by_hand


def dry_run_of(recipe: Recipe, pipeline: Pipeline, surroundings: Surroundings, *, force: bool = False) -> DryRun:
    """Look at every step of a pipeline and write nothing."""
    planned = [*pipeline.planned(force=force)]
    package = Package.here()
    container = _container(recipe, surroundings, package)
    inside = _Inside(recipe, container, package, surroundings)
    commands = [*inside.commands([one.step for one in planned])]
    return DryRun(recipe, planned, surroundings.image, container.start(), commands)


def engine_commands(recipe: Recipe, surroundings: Surroundings = Surroundings()) -> str:  # frozen
    """Return what `build-llm` runs, with paths as they are inside the container."""
    package = Package.here()
    inside = _Inside(recipe, _container(recipe, surroundings, package), package, surroundings)
    return "\n".join(inside.engine_lines(recipe.decoder_folder))


def _container(recipe: Recipe, surroundings: Surroundings, package: Package) -> Container:
    checkpoint = recipe.checkpoint_folder
    files = [path for path in checkpoint.iterdir() if path.is_file()]
    mounts = [
        *package.mounts_for(ONE_RANK_PROGRAM.resolve()),
        folder_mount(recipe.workspace, "/workspace", is_writable=True),
        folder_mount(checkpoint, "/checkpoint", files),
    ]
    if recipe.calibration_folder is not None:
        pictures = [path for path in recipe.calibration_folder.rglob("*") if path.is_symlink()]
        mounts.append(folder_mount(recipe.calibration_folder, "/calibration", pictures))
    if surroundings.profile_file is not None:
        file = absolute(surroundings.profile_file)
        mounts.append(Mount(file, PurePosixPath("/profile") / file.name))
    return Container(surroundings.image, tuple(mounts))


@dataclass(frozen=True)
class _Inside:
    """A build as it is inside the container."""

    recipe: Recipe
    container: Container
    package: Package
    surroundings: Surroundings

    def commands(self, steps: Iterable[Step]) -> Iterator[StepCommands]:
        """Yield the commands of the steps that need the container's TensorRT or TensorRT-LLM."""
        profile = self.recipe.profile
        for step in steps:
            if step.name == "build-vision" and profile.vision.runtime == TENSORRT:
                yield StepCommands(step.name, self._itself(step.name, *_INSTALLED_FOR_GATE))
            if step.name == "build-llm" and profile.decoder.runtime == TENSORRT_LLM:
                yield StepCommands(step.name, self._itself(step.name), tuple(self.engine_lines(step.inputs["decoder"])))

    def _itself(self, step: str, *packages: str) -> tuple[str, str]:
        recipe, profile_file = self.recipe, self.surroundings.profile_file
        profile = recipe.profile.name if profile_file is None else self._place(profile_file)
        words = ["nvlm", step, self._place(recipe.checkpoint_folder), "--profile", profile]
        words += ["--workspace", self._place(recipe.workspace)]
        if recipe.calibration_folder is not None:
            words += ["--calibration", self._place(recipe.calibration_folder)]
        return self.package.install(*packages), shlex.join(words)

    def engine_lines(self, decoder: Path) -> list[str]:
        """Return what trtllm-build is asked; `decoder` is the checkpoint where it lies now, which may be a slot."""
        recipe = self.recipe
        settings = engine_settings(recipe)
        plan = plan_engines(recipe.layout(), settings.sku, settings.limits)
        folder = recipe.engines / BY_HAND / recipe.decoder_engine_folder.name
        places = BuildPlaces(
            self.container.inside(decoder),
            self.container.inside(folder),
            self.container.inside(ONE_RANK_PROGRAM.resolve()),
        )
        cache = Path(self._place(settings.cache_folder))
        return dry_run(plan, places, dataclasses.replace(settings, cache_folder=cache)).splitlines()

    def _place(self, path: Path) -> str:
        return str(self.container.inside(path))


def _reads(planned: Planned, recipe: Recipe) -> Iterator[str]:
    """Yield what a step reads, a line for the checkpoint, one for the calibration list, one for each artifact."""
    inputs = dict(planned.step.inputs)
    samples = [name for name in inputs if name.startswith(CALIBRATION_INPUT)]
    folder = absolute(recipe.checkpoint_folder)
    files = [name for name, path in inputs.items() if name not in samples and absolute(path).parent == folder]
    if files:
        yield f"{recipe.checkpoint_folder} ({_some(files)})"
    if samples and recipe.calibration_folder is not None:
        yield f"{recipe.calibration_folder} ({_some([name.removeprefix(CALIBRATION_INPUT) for name in samples])})"
    yield from dict.fromkeys(str(path) for name, path in inputs.items() if name not in {*samples, *files})
    # what decides nothing of the result is no input, and read all the same: the encoder's files, the gate's pictures
    if planned.step.name == "calibrate-llm":
        yield str(recipe.vision_folder)
    if planned.step.name == "build-vision" and recipe.calibration_folder is not None:
        yield f"{recipe.calibration_folder} (pictures for the numerics gate)"


def _some(names: Sequence[str]) -> str:
    return f"{names[0]}, {names[1]} and {len(names) - 2} more" if len(names) > 2 else ", ".join(names)
