"""Before the first engine in a container: does its TensorRT-LLM take what we are about to give it (contract J.11)?"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nvlm_deploy.checkpoint.trtllm_config import config_from_layout
from nvlm_deploy.checkpoint.trtllm_layout import FP8, FP8_PER_CHANNEL, Layout, Parallelism
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.llm.engine import EngineSettings, plan_engines, rank_commands
from nvlm_deploy.llm.engine_arguments import EngineLimits
from nvlm_deploy.llm.engine_config import differences
from nvlm_deploy.llm.engine_one_rank import BUILD_AND_SAVE, PARALLEL_BUILD
from nvlm_deploy.llm.engine_tool import CONTAINERS_HINT, BuildTool, found_tool, release_of
from nvlm_deploy.machine.resources import Gpu, visible_gpus
from nvlm_deploy.model.released import NVLM_D_72B
from nvlm_deploy.model.spec import spec_from_config
from nvlm_deploy.scratch import scratch_folder
from nvlm_deploy.sku import load_sku

PROBE_PROGRAM = Path(__file__).with_name("preflight_probe.py")
# of equal layers three show all that there is
RELEASED_DECODER = replace(spec_from_config(NVLM_D_72B).decoder, layers=3)
# weights, KV cache: what profiles may choose
RECIPES = ((None, None), (FP8, None), (FP8, FP8), (FP8_PER_CHANNEL, None))
SPLITS = (Parallelism(1), Parallelism(2), Parallelism(16), Parallelism(2, 2))
# a GPU that takes every recipe, so that every flag we ever emit is among those looked for
_ANY_SKU = "h100-sxm-80gb"
_TYPES = {"BF16": "BF16", "FP8": "F8_E4M3", "FLOAT": "F32", "HALF": "F16"}
# computed by the loader from kv_cache_scaling_factor (contract A.7)
_MADE_BY_LOADER = "kv_cache_rcp_scaling_factor"
_REPORT_FIX = "do not build with this release: send this report to the makers of nvlm-deploy, or take 26.07"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `fix` is for one that is not as it must be."""

    check: str
    passed: bool
    found: str
    fix: str | None = None


@dataclass(frozen=True)
class Preflight:
    """All findings; engines may be built when every one passed."""

    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        return all(finding.passed for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        return {"passed": self.passed, "findings": [asdict(finding) for finding in self.findings]}


def standard_layouts() -> dict[str, Layout]:
    """Every recipe in a few splits, at the released model's width."""
    layouts = {}
    for quant_algo, kv_cache in RECIPES:
        for split in SPLITS:
            if split.pipeline > 1 and quant_algo is None:
                continue  # stages differ in layers only: shown once, quantised
            name = f"{quant_algo or 'BF16'}{' + FP8 KV' if kv_cache else ''} TP {split.tensor} PP {split.pipeline}"
            layouts[name] = Layout(RELEASED_DECODER, quant_algo, split, kv_cache_quant_algo=kv_cache)
    return layouts


def preflight(layouts: Mapping[str, Layout]) -> Preflight:
    """Look at the container this runs in. Never raises for what it finds: that is the report."""
    try:
        tool = found_tool()
    except NvlmError as problem:
        return Preflight((Finding("trtllm-build", False, problem.message, problem.hint),))
    probed = _probed(tool, layouts)
    return Preflight(
        (
            _tool(tool),
            *_modules(tool, probed["modules"]),
            _triton(tool, probed["modules"]["tritonserver"]),
            _gpus(visible_gpus()),
            _flags(tool),
            *_one_rank(probed["functions"]),
            *_configs(layouts, probed["configs"]),
            *_tensors(layouts, probed["ranks"]),
        )
    )


def _tool(tool: BuildTool) -> Finding:
    try:
        release = release_of(tool.version)
    except NvlmError as problem:
        return Finding("trtllm-build", False, problem.message, problem.hint)
    return Finding("trtllm-build", True, f"{tool.executable}, TensorRT-LLM {tool.version} ({release.name} is known)")


def _modules(tool: BuildTool, modules: Mapping[str, Mapping[str, str]]) -> Iterator[Finding]:
    """tensorrt_llm and tensorrt must be importable and belong together; tritonserver's Python API need not be there."""
    wanted = {"tensorrt_llm": tool.version, "tensorrt": _tensorrt_of(tool.version)}
    for name, prefix in wanted.items():
        answer = modules[name]
        if "error" in answer:
            fix = "run inside the container, with its GPU (`--gpus all`): the import needs CUDA's libraries"
            yield Finding(f"import {name}", False, answer["error"], fix)
            continue
        right = answer["value"].startswith(prefix)
        found = f"{name} {answer['value']}" + ("" if right else f", expected {prefix}x")
        yield Finding(f"import {name}", right, found, None if right else f"no pip install over it: {CONTAINERS_HINT}")


def _tensorrt_of(version: str) -> str:
    try:
        return release_of(version).tensorrt
    except NvlmError:
        return ""  # the version is a finding of its own


def _triton(tool: BuildTool, python_api: Mapping[str, str]) -> Finding:
    """Triton's images say their tag and version in the environment (server/build.py)."""
    executable, tag = shutil.which("tritonserver"), os.environ.get("NVIDIA_TRITON_SERVER_VERSION", "")
    fix: str | None
    if executable is None:
        fix = f"engines can be built here, but what serves them must have the same version: {CONTAINERS_HINT}"
        return Finding("tritonserver", False, "no tritonserver on PATH", fix)
    version = os.environ.get("TRITON_SERVER_VERSION", "of no stated version")
    found = f"{executable} {version}, container {tag or 'of no stated tag'}"
    if "value" in python_api:
        found += f", Python API {python_api['value']}"
    try:
        containers = release_of(tool.version).containers
    except NvlmError:
        containers = ()
    right = not tag or not containers or tag in containers
    fix = None if right else f"TensorRT-LLM {tool.version} belongs to {', '.join(containers)}: {CONTAINERS_HINT}"
    return Finding("tritonserver", right, found, fix)


def _gpus(gpus: Sequence[Gpu]) -> Finding:
    if not gpus:
        return Finding("GPU", False, "none is visible", "start the container with its GPUs (`--gpus all`)")
    names = ", ".join(f"{gpu.name} ({gpu.compute_capability})" for gpu in gpus)
    return Finding("GPU", True, f"{len(gpus)}: {names}")


def emitted_flags() -> set[str]:
    """Every flag that `nvlm build-llm` gives to trtllm-build, whatever the profile."""
    sku, limits = load_sku(_ANY_SKU), EngineLimits(8, 32768, 32768, 28672)
    settings, nowhere = EngineSettings(sku, limits, Path("cache")), Path("folder")
    layouts = [Layout(RELEASED_DECODER, algo, kv_cache_quant_algo=kv_cache) for algo, kv_cache in RECIPES]
    plans = [plan_engines(layout, sku, limits) for layout in layouts]
    commands = [command for plan in plans for command in rank_commands(plan, nowhere, nowhere, settings)]
    return {word for command in commands for word in command.argv if word.startswith("--")}


def _flags(tool: BuildTool) -> Finding:
    done = subprocess.run([tool.executable, "--help"], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no words"])[-1]
        return Finding("flags", False, f"`trtllm-build --help` ended with {done.returncode}: {last}", _REPORT_FIX)
    emitted, known = emitted_flags(), set(re.findall(r"--[a-z][a-z0-9_]*", done.stdout))
    missing = sorted(emitted - known)
    found = f"{len(emitted)} of {len(emitted)} in `trtllm-build --help`"
    if missing:
        found = f"not in `trtllm-build --help`: {', '.join(missing)}"
    return Finding("flags", not missing, found, _REPORT_FIX if missing else None)


def _one_rank(functions: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    """What building a rank in its own process relies on (engine_one_rank.py)."""
    for name, wanted in (("parallel_build", PARALLEL_BUILD), ("build_and_save", BUILD_AND_SAVE)):
        answer = functions[name]
        parameters = answer.get("value", [])
        passed = tuple(parameters[: len(wanted)]) == wanted
        found = f"{name}({', '.join(parameters)})" if parameters else str(answer.get("error"))
        fix = "with several ranks use the command for all of them that `nvlm build-llm --dry-run` prints last"
        yield Finding(f"one rank alone: {name}", passed, found, None if passed else fix)


def _configs(layouts: Mapping[str, Layout], configs: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    """config.json goes in and comes out with every key and value."""
    for name, layout in layouts.items():
        answer, check = configs[name], f"config.json {name}"
        if "error" in answer:
            yield Finding(check, False, answer["error"], _REPORT_FIX)
            continue
        expected = config_from_layout(layout)
        lost = [
            f"{other.field} {other.found!r}, ours {other.expected!r}"
            for other in differences(expected, answer["value"])
        ]
        found = _some(lost) if lost else f"{len(expected)} keys come back as they were"
        yield Finding(check, not lost, found, _REPORT_FIX if lost else None)


def _tensors(layouts: Mapping[str, Layout], ranks: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[Finding]:
    """The tensors that the network wants are those that our rank files hold: names, types and shapes."""
    for name, layout in layouts.items():
        for rank, answer in enumerate(ranks[name]):
            check = f"tensors {name} rank {rank}"
            if "error" in answer:
                yield Finding(check, False, answer["error"], _REPORT_FIX)
                continue
            wanted = _wanted(answer["value"])
            wrong = list(_mismatches(wanted, layout.rank_tensors(rank)))
            found = _some(wrong) if wrong else f"{len(wanted)} names, types and shapes are ours"
            yield Finding(check, not wrong, found, _REPORT_FIX if wrong else None)


_Tensors = Mapping[str, tuple[str, tuple[int, ...]]]


def _wanted(parameters: Mapping[str, Sequence[Any]]) -> _Tensors:
    return {
        name: (_TYPES.get(dtype, dtype), tuple(shape))
        for name, (dtype, shape) in parameters.items()
        if not name.endswith(_MADE_BY_LOADER)
    }


def _mismatches(wanted: _Tensors, ours: _Tensors) -> Iterator[str]:
    for name in sorted(wanted.keys() | ours.keys()):
        if name not in ours:
            yield f"{name} is wanted, we do not write it"
        elif name not in wanted:
            yield f"{name} is ours, nobody wants it"
        elif wanted[name] != ours[name]:
            theirs, own = (f"{dtype} {list(shape)}" for dtype, shape in (wanted[name], ours[name]))
            yield f"{name} is wanted as {theirs}, ours is {own}"


def _some(items: Sequence[str], most: int = 3) -> str:
    more = f"; and {len(items) - most} more" if len(items) > most else ""
    return "; ".join(items[:most]) + more


def _probed(tool: BuildTool, layouts: Mapping[str, Layout]) -> dict[str, Any]:
    """What the child found; a library that crashes takes only the child with it."""
    request = {
        name: {"config": config_from_layout(layout), "ranks": layout.parallelism.world_size}
        for name, layout in layouts.items()
    }
    with scratch_folder("preflight") as scratch:
        asked, answer = (scratch / name for name in ("request.json", "answer.json"))
        asked.write_text(json.dumps(request), encoding="utf-8")
        command = [tool.interpreter, "-P", str(PROBE_PROGRAM), str(asked), str(answer)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if answer.is_file() and done.returncode == 0:
            probed: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
            return probed
        last = (done.stderr.strip().splitlines() or ["no words"])[-1]
        return _nothing(layouts, f"the probe ended with {done.returncode}: {last}")


def _nothing(layouts: Mapping[str, Layout], reason: str) -> dict[str, Any]:
    error = {"error": reason}
    return {
        "modules": dict.fromkeys(("tensorrt_llm", "tensorrt", "tritonserver"), error),
        "functions": dict.fromkeys(("parallel_build", "build_and_save"), error),
        "configs": dict.fromkeys(layouts, error),
        "ranks": {name: [error] for name in layouts},
    }
