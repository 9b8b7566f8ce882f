"""A TensorRT or TensorRT-RTX engine from an exported vision graph: what is refused, and the child that builds it."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nvlm_deploy.artifacts import write_text
from nvlm_deploy.errors import MachineError, NvlmError
from nvlm_deploy.model.spec import TilingSpec
from nvlm_deploy.scratch import scratch_folder
from nvlm_deploy.sku import TENSORRT, TENSORRT_RTX, Sku
from nvlm_deploy.vision.graph_file import graph_from_file

log = logging.getLogger(__name__)

PLAN_NAME = "vision.plan"
FACTS_NAME = "vision.plan.json"
LOG_NAME = "builder.log"


# the first module found is used: the wheels of TensorRT-RTX bring `tensorrt_rtx_bindings` alone
MODULES = {TENSORRT: ("tensorrt",), TENSORRT_RTX: ("tensorrt_rtx", "tensorrt_rtx_bindings")}
INSTALL_HINTS = {
    TENSORRT: "no package index has it: build in the container that will serve (Triton 26.04 to 26.07 with "
    "TensorRT-LLM has TensorRT 10.14.1.48)",
    TENSORRT_RTX: "pip install tensorrt_rtx_cu13_libs==1.7.1.116 tensorrt_rtx_cu13_bindings==1.7.1.116",
}
# members of tensorrt_rtx.ComputeCapability at 1.7.1
RTX_TARGETS = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")

PRODUCTS = ("Conv", "Gemm", "MatMul")
TAIL_LINES = 12
_MODULE_OF_CHILD = "nvlm_deploy.vision.tensorrt_build"
_KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL)


@dataclass(frozen=True)
class TileRange:
    """How many tiles one run of an engine takes; it is tuned for `optimum`."""

    minimum: int
    optimum: int
    maximum: int

    def __post_init__(self) -> None:
        if not 1 <= self.minimum <= self.optimum <= self.maximum:
            raise NvlmError(f"no engine takes {self.minimum} to {self.maximum} tiles tuned for {self.optimum}")


def tile_range(tiling: TilingSpec, *, most_tiles: int) -> TileRange:
    """From one tile to the most that one run may hold, tuned for a full image with its thumbnail where that fits."""
    return TileRange(1, min(tiling.max_tiles_with_thumbnail, most_tiles), most_tiles)


@dataclass(frozen=True)
class BuildSettings:
    """What an engine is built for and how hard the builder tries.

    `cache_folder` outlives builds: timing caches by cohort, and the log of the last build that failed.
    `workspace_bytes` bounds the GPU memory a kernel may ask for; None leaves it to the builder.
    """

    runtime: str
    sku: Sku
    tiles: TileRange
    cache_folder: Path
    optimization_level: int = 3
    workspace_bytes: int | None = None


@dataclass(frozen=True)
class BuildRequest:
    """What the child process is told, as JSON; `tiles` is minimum, optimum, maximum."""

    onnx: str
    plan: str
    answer: str
    runtime: str
    precision: str
    sku: str
    compute_capability: str
    tiles: tuple[int, int, int]
    cache_folder: str
    optimization_level: int
    workspace_bytes: int | None


def engine_from_onnx(onnx: Path, folder: Path, settings: BuildSettings) -> Path:
    """Build `vision.plan` into `folder`, with `builder.log` and, in `vision.plan.json`, what built it; return the plan.

    Raises NvlmError before any build when the target cannot run the graph, and with the builder's own words when it
    refuses the graph; MachineError when the runtime or the GPU is missing or the builder dies.
    """
    precision = precision_of(onnx)
    require_target(settings.runtime, precision, settings.sku)
    installed_module(settings.runtime)
    with scratch_folder("build") as scratch:
        request = _request(onnx, folder, scratch, precision, settings)
        log.info("%s builds %s for %s, log %s", settings.runtime, PLAN_NAME, settings.sku.name, folder / LOG_NAME)
        facts = _built(request, scratch, folder / LOG_NAME)
    write_text(folder / FACTS_NAME, json.dumps(facts, indent=2, sort_keys=True) + "\n")
    log.info("%s: %d bytes in %.1f s", folder / PLAN_NAME, facts["plan_bytes"], facts["seconds"])
    return folder / PLAN_NAME


def require_target(runtime: str, precision: str, sku: Sku) -> None:
    """Refuse, with the reason, what this GPU cannot compute or this runtime cannot build for it."""
    if runtime not in MODULES:
        raise NvlmError(f"no engine builder {runtime!r}; there is {', '.join(MODULES)}")
    if sku.compute_capability is None:
        raise NvlmError(
            f"SKU {sku.name!r} has no GPU: {runtime} builds for GPUs", hint='choose runtime = "onnxruntime"'
        )
    _require_precision(precision, sku)
    if runtime == TENSORRT_RTX and TENSORRT_RTX not in sku.runtimes:
        raise NvlmError(
            f"TensorRT-RTX has no target for {_gpu(sku)}; it builds for {', '.join(RTX_TARGETS)}",
            hint='choose runtime = "tensorrt", which builds on the GPU itself',
        )


def _require_precision(precision: str, sku: Sku) -> None:
    reasons = {"fp8": (sku.has_fp8, "FP8", "8.9", "bf16"), "bf16": (sku.has_bf16, "BF16", "8.0", "fp16")}
    able, name, first, instead = reasons.get(precision, (True, "", "", ""))
    if not able:
        raise NvlmError(
            f"{_gpu(sku)} has no {name}: its tensor cores learned it with compute capability {first}",
            hint=f'choose precision = "{instead}" for the vision encoder and export the graph again',
        )


def _gpu(sku: Sku) -> str:
    return f"{sku.name} (compute capability {sku.compute_capability})"


def installed_module(runtime: str) -> str:
    """Name of the Python module that builds; found, not imported. Raises MachineError when there is none."""
    for name in MODULES[runtime]:
        if importlib.util.find_spec(name) is not None:
            return name
    raise MachineError(f"no Python module {MODULES[runtime][0]!r} here", hint=INSTALL_HINTS[runtime])


def precision_of(onnx: Path) -> str:
    """fp8, bf16, fp16 or fp32: the lowest its products are in, read from the graph, whatever its maker says.

    Raises NvlmError for a file that is missing or no graph.
    """
    from nvlm_deploy.vision.element_types import FLOAT8_TYPES, element_types, short_name

    graph = graph_from_file(onnx)[1].graph
    types = element_types(graph)
    if not set(FLOAT8_TYPES).isdisjoint(types.values()):
        return "fp8"
    # not of every value: an fp16 graph may hand over its embeddings in bf16
    factors = {short_name(types.get(node.inputs[1])) for node in graph if node.op_type in PRODUCTS and node.inputs[1]}
    return next((name for name in ("bf16", "fp16") if name in factors), "fp32")


def _request(onnx: Path, folder: Path, scratch: Path, precision: str, settings: BuildSettings) -> BuildRequest:
    assert settings.sku.compute_capability is not None  # require_target has seen to it
    return BuildRequest(
        onnx=str(onnx.resolve()),
        plan=str((folder / PLAN_NAME).resolve()),
        answer=str(scratch / "answer.json"),
        runtime=settings.runtime,
        precision=precision,
        sku=settings.sku.name,
        compute_capability=settings.sku.compute_capability,
        tiles=(settings.tiles.minimum, settings.tiles.optimum, settings.tiles.maximum),
        cache_folder=str(settings.cache_folder.resolve()),
        optimization_level=settings.optimization_level,
        workspace_bytes=settings.workspace_bytes,
    )


def _built(request: BuildRequest, scratch: Path, log_file: Path) -> dict[str, Any]:
    """What the child says of the plan it wrote; a builder may be killed or crash and must not take us with it."""
    request_file = scratch / "request.json"
    request_file.write_text(json.dumps(asdict(request)), encoding="utf-8")
    with log_file.open("wb") as file:
        command = _command(request_file)
        code = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, check=False
        ).returncode
    answer = Path(request.answer)
    if code == 0 and answer.is_file():
        facts: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        return facts
    kept = _kept(log_file, request)
    if not answer.is_file() or code not in (NvlmError.exit_code, MachineError.exit_code):
        raise _death(request, code, log_file, kept)
    refusal = json.loads(answer.read_text(encoding="utf-8"))
    kind = MachineError if code == MachineError.exit_code else NvlmError
    raise kind(f"{refusal['message']}\n  log: {kept}", hint=refusal["hint"])


def _command(request_file: Path) -> list[str]:
    # -P: a file called tensorrt.py in the folder one stands in is not the builder
    return [sys.executable, "-P", "-m", _MODULE_OF_CHILD, str(request_file)]


def _kept(log_file: Path, request: BuildRequest) -> Path:
    """The log where it stays: the folder that was to become the artifact goes when the build has failed."""
    kept = Path(request.cache_folder) / f"{request.runtime}-{request.sku}-failed.log"
    kept.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(log_file, kept)
    return kept


def _death(request: BuildRequest, code: int, log_file: Path, kept: Path) -> MachineError:
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    lines = log_file.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]
    tail = "\n".join(f"  | {line[:300]}" for line in lines) or "  | (empty)"
    hint = f"read {kept}; a crash of the builder belongs to its makers: try another optimization_level"
    if code in _KILLED:
        hint = "mostly out of memory (`dmesg | grep -i oom`): a build needs as much as the weights and 2 GB more"
    return MachineError(f"the {request.runtime} builder {how} at {request.onnx}\n{tail}\n  log: {kept}", hint=hint)
