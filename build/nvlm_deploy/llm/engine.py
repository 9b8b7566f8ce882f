"""Engines from a TensorRT-LLM checkpoint by NVIDIA's trtllm-build: what is asked, what it costs, and the read-back."""

from __future__ import annotations

import dataclasses
import logging
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from nvlm_deploy.artifacts import replace_file
from nvlm_deploy.checkpoint.stream import tensor_bytes
from nvlm_deploy.checkpoint.trtllm import read_checkpoint
from nvlm_deploy.checkpoint.trtllm_config import config_from_layout
from nvlm_deploy.checkpoint.trtllm_layout import Layout
from nvlm_deploy.digest import sha256_of
from nvlm_deploy.errors import MachineError, NvlmError
from nvlm_deploy.llm.engine_arguments import Argument, EngineLimits, engine_arguments
from nvlm_deploy.llm.engine_config import expected_config, require_as_asked
from nvlm_deploy.llm.engine_ranks import RankBuild, RankCommand, Workshop, build_ranks
from nvlm_deploy.llm.engine_tool import EXECUTABLE, NEWEST, BuildTool, installed_tool
from nvlm_deploy.machine.resources import Machine, this_machine
from nvlm_deploy.sku import Sku

log = logging.getLogger(__name__)

ONE_RANK_PROGRAM = Path(__file__).with_name("engine_one_rank.py")
TIMING_CACHE_NAME = "timing.cache"
# trtllm-build where none is installed: as the container has it, found on PATH
CONTAINERS_TOOL = BuildTool(EXECUTABLE, "python3", NEWEST.name)

# Host memory of one rank: the weights as they are loaded, the builder's copy, and the serialised engine; beside them
# libraries and the CUDA context. Logs in public show 2.5 times (70 GB of weights, 172 GiB: Command R in FP16) and 2.2
# times (8.1 GB, 17.7 GiB) at the line "Build phase peak memory".
COPIES_OF_WEIGHTS = 3
BASE_BYTES = 4 << 30


@dataclass(frozen=True)
class EngineSettings:
    """What engines are built for. `cache_folder` outlives builds: timing caches, and logs of builds that failed.

    `at_once` bounds how many ranks are built at a time; None leaves it to memory and GPUs.
    """

    sku: Sku
    limits: EngineLimits
    cache_folder: Path
    at_once: int | None = None


@dataclass(frozen=True)
class EnginePlan:
    """The build of all ranks, before anything runs."""

    layout: Layout
    arguments: tuple[Argument, ...]
    rank_bytes: int

    @property
    def ranks(self) -> int:
        return self.layout.parallelism.world_size

    def at_once(self, machine: Machine) -> int:
        """Ranks that fit in the machine's free memory together, each with a GPU of its own; at least one."""
        return max(1, min(self.ranks, len(machine.gpus), machine.available_bytes // self.rank_bytes))


@dataclass(frozen=True)
class BuiltEngines:
    """Engines whose config.json is what was asked."""

    folder: Path
    version: str
    config: Mapping[str, Any]
    ranks: tuple[RankBuild, ...]
    timing_cache_sha256: str | None

    @property
    def notes(self) -> dict[str, Any]:
        """For the manifest: measured, per rank."""
        return {
            "tensorrt_llm": self.version,
            "timing_cache_sha256": self.timing_cache_sha256,
            "seconds": [build.seconds for build in self.ranks],
            "peak_host_bytes": [build.peak_bytes for build in self.ranks],
            "attempts": [build.attempts for build in self.ranks],
        }


def plan_engines(layout: Layout, sku: Sku, limits: EngineLimits) -> EnginePlan:
    """Raises NvlmError for a GPU or limits that cannot be; needs neither checkpoint nor container."""
    arguments = engine_arguments(config_from_layout(layout), sku, limits)
    return EnginePlan(layout, arguments, rank_memory_bytes(layout))


def rank_memory_bytes(layout: Layout) -> int:
    """Host memory that the build of the largest rank is thought to need (the rule is at COPIES_OF_WEIGHTS)."""
    ranks = range(layout.parallelism.world_size)
    weights = max(
        sum(tensor_bytes(dtype, shape) for dtype, shape in layout.rank_tensors(rank).values()) for rank in ranks
    )
    return COPIES_OF_WEIGHTS * weights + BASE_BYTES


def rank_commands(
    plan: EnginePlan, checkpoint: Path, folder: Path, settings: EngineSettings, *, tool: BuildTool = CONTAINERS_TOOL
) -> list[RankCommand]:
    """Return one command per rank, with paths of this machine; without a tool, as the container's would be called."""
    here = dataclasses.replace(settings, cache_folder=settings.cache_folder.resolve())
    return _commands(plan, BuildPlaces(checkpoint.resolve(), folder.resolve(), ONE_RANK_PROGRAM), here, tool)


@dataclass(frozen=True)
class BuildPlaces:
    """Where a build reads and writes, as its commands name it: here, or inside a container."""

    checkpoint: PurePath
    folder: PurePath
    one_rank_program: PurePath = ONE_RANK_PROGRAM


def dry_run(plan: EnginePlan, places: BuildPlaces, settings: EngineSettings) -> str:
    """Return the commands to paste, and as remarks what each needs; nothing is looked for or written.

    One line for each rank, and all ranks by one process. Paths are written as they are given.
    """
    commands = _commands(plan, places, settings, CONTAINERS_TOOL)
    folders = shlex.join(["mkdir", "-p", str(places.folder), str(settings.cache_folder)])
    gib = plan.rank_bytes / 2**30
    lines = [f"# {plan.ranks} rank(s), each thought to need {gib:.0f} GiB of host memory and a GPU", folders]
    lines += [command.shell for command in commands]
    if plan.ranks > 1:
        together = RankCommand(0, (EXECUTABLE, *_shared_arguments(plan, places, settings, CONTAINERS_TOOL)))
        lines.append(f"# or all ranks by one process, one after the other: {together.shell}")
    return "\n".join(lines)


def _commands(plan: EnginePlan, places: BuildPlaces, settings: EngineSettings, tool: BuildTool) -> list[RankCommand]:
    shared = _shared_arguments(plan, places, settings, tool)
    if plan.ranks == 1:
        return [RankCommand(0, (tool.executable, *shared))]
    program = (tool.interpreter, "-P", str(places.one_rank_program))
    return [RankCommand(rank, (*program, str(rank), *shared)) for rank in range(plan.ranks)]


def engines_from_checkpoint(
    checkpoint: Path, folder: Path, settings: EngineSettings, *, machine: Machine | None = None
) -> BuiltEngines:
    """Build every rank's engine into `folder`, with each rank's log; what an earlier run finished there is kept.

    Raises NvlmError before any build for a checkpoint that is not whole, or that the GPU cannot run; MachineError for a
    missing or foreign trtllm-build, another GPU, a build that fails, and engines that are not what was asked.
    """
    found = read_checkpoint(checkpoint)
    plan = plan_engines(found.layout, settings.sku, settings.limits)
    tool = installed_tool()
    machine = this_machine() if machine is None else machine
    require_machine(machine, settings.sku, plan)
    cache = timing_cache(settings, tool)
    digest = sha256_of(cache) if cache.is_file() else None
    shop = Workshop(folder.resolve(), [gpu.device for gpu in machine.gpus], plan.rank_bytes, settings.cache_folder)
    at_once = min(plan.at_once(machine), settings.at_once or plan.ranks)
    builds = build_ranks(rank_commands(plan, checkpoint, folder, settings, tool=tool), shop, at_once=at_once)
    config = require_as_asked(folder, expected_config(tool.version, found.config, plan.arguments))
    _keep_timing_cache(folder / TIMING_CACHE_NAME, cache)
    return BuiltEngines(folder, tool.version, config, tuple(builds), digest)


def require_machine(machine: Machine, sku: Sku, plan: EnginePlan) -> None:
    """Raises where no GPU is, or another than the engines are for; too little memory is only said."""
    if not machine.gpus:
        raise MachineError("no GPU here: trtllm-build needs one", hint="build on the GPU that will serve")
    others = [gpu for gpu in machine.gpus if gpu.compute_capability != sku.compute_capability]
    if others:
        raise NvlmError(
            f"this machine has {others[0].name} (compute capability {others[0].compute_capability}), the profile's SKU "
            f"{sku.name} has {sku.compute_capability}: the engines would not load there",
            hint="build on the GPU that will serve, name this GPU's SKU in the profile, or set CUDA_VISIBLE_DEVICES",
        )
    if machine.available_bytes < plan.rank_bytes:
        log.warning(
            "one rank is thought to need %.0f GiB of host memory, %.0f GiB are free: the build may be killed",
            plan.rank_bytes / 2**30,
            machine.available_bytes / 2**30,
        )


def timing_cache(settings: EngineSettings, tool: BuildTool) -> Path:
    """Kernel times of earlier builds: of one TensorRT-LLM on one kind of GPU."""
    return settings.cache_folder / f"trtllm-{tool.version}-{settings.sku.name}.cache"


def _shared_arguments(
    plan: EnginePlan, places: BuildPlaces, settings: EngineSettings, tool: BuildTool
) -> tuple[str, ...]:
    named = {
        "--checkpoint_dir": places.checkpoint,
        "--output_dir": places.folder,
        # read from one place and written to another: rank 0 writes it while other ranks may be reading
        "--input_timing_cache": timing_cache(settings, tool),
        "--output_timing_cache": places.folder / TIMING_CACHE_NAME,
    }
    words = [word for flag, place in named.items() for word in (flag, str(place))]
    choices = [word for argument in plan.arguments for word in (argument.flag, argument.value)]
    return (*words, *choices, "--workers", "1", "--log_level", "info")


def _keep_timing_cache(written: Path, cache: Path) -> None:
    if written.is_file():
        with replace_file(cache) as temporary:
            temporary.write_bytes(written.read_bytes())
        written.unlink()
