"""The program of the builder's child process: `python -m nvlm_deploy.vision.tensorrt_build request.json`.

Its stdout and stderr are builder.log; its answer is a file, so that it counts only when it was written to the end.
TensorRT 10.14, TensorRT 11 and TensorRT-RTX share all of it but the target: the first two build for the GPU in the
machine, TensorRT-RTX for a compute capability by name, on any machine.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from nvlm_deploy.artifacts import replace_file, write_text
from nvlm_deploy.digest import sha256_of
from nvlm_deploy.errors import MachineError, NvlmError
from nvlm_deploy.machine.resources import visible_gpus
from nvlm_deploy.sku import TENSORRT, TENSORRT_RTX
from nvlm_deploy.tensors import EMBEDDINGS, TILES
from nvlm_deploy.vision.tensorrt import BuildRequest, installed_module

# 10.14 is in the pinned containers; of 11 and RTX 1.7 every name used below was looked up in their Python bindings
KNOWN_VERSIONS = {TENSORRT: ("10.14.", "11."), TENSORRT_RTX: ("1.7.",)}


def main(request_file: str) -> int:
    """Build what the request says and answer; 0, or the exit code of the refusal."""
    request = BuildRequest(**json.loads(Path(request_file).read_text(encoding="utf-8")))
    answer: Mapping[str, Any]
    try:
        answer, code = build(request), 0
    except NvlmError as refusal:
        answer, code = {"message": refusal.message, "hint": refusal.hint}, refusal.exit_code
    write_text(Path(request.answer), json.dumps(answer))
    return code


def build(request: BuildRequest) -> dict[str, Any]:
    """Write the plan; return what is worth knowing of how it was made.

    Raises NvlmError with the builder's own words, MachineError where the machine lacks something.
    """
    started = time.monotonic()
    trt = importlib.import_module(installed_module(request.runtime))
    require_version(request.runtime, trt.__version__)
    gpu = require_gpu(request.compute_capability) if request.runtime == TENSORRT else None
    session = Session.of(trt)
    network, parser = parsed_network(session, Path(request.onnx))
    config = builder_config(session, request)
    config.add_optimization_profile(optimization_profile(session, network, request))
    cache = timing_cache(request, trt.__version__)
    use_timing_cache(config, cache)
    with replace_file(Path(request.plan)) as temporary, temporary.open("wb") as file:
        write_plan(session, network, config, file)
    del parser  # it owns the weights' memory: it must live as long as the build
    keep_timing_cache(config, cache)
    return facts(request, trt.__version__, gpu, cache, time.monotonic() - started)


def require_version(runtime: str, version: str) -> None:
    if not version.startswith(KNOWN_VERSIONS[runtime]):
        known = " or ".join(f"{prefix}x" for prefix in KNOWN_VERSIONS[runtime])
        raise MachineError(
            f"{runtime} {version} is installed; this tool knows {known}",
            hint="a plan loads only in the version that built it: build in the container that will serve",
        )


def require_gpu(compute_capability: str) -> str:
    """Name of the GPU that TensorRT builds for, the first in this machine; another than the SKU's is refused."""
    gpus = visible_gpus()
    if not gpus:
        raise MachineError(
            "no GPU here: TensorRT builds for the GPU in the machine only",
            hint='build on the GPU that will serve; runtime = "tensorrt_rtx" builds without one, for Ada and RTX',
        )
    gpu = gpus[0]
    if gpu.compute_capability != compute_capability:
        raise NvlmError(
            f"this machine's GPU is {gpu.name} (compute capability {gpu.compute_capability}), the profile's SKU has "
            f"{compute_capability}: the engine would not load there",
            hint="build on the GPU that will serve, or name this GPU's SKU in the profile",
        )
    return gpu.name


def builder_log(trt: Any) -> Any:
    """A logger that prints, and remembers errors: the builder's own words when it refuses."""

    class BuilderLog(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message.strip())
            # of the verbose flood only the kernels chosen: they tell whether attention was fused
            if severity <= trt.ILogger.INFO or message.startswith("Layers:"):
                print(f"[{severity.name}] {message}", flush=True)

    return BuilderLog()


@dataclass(frozen=True)
class Session:
    """The module that builds, its builder, and the log that both its parser and its builder speak to."""

    trt: Any
    builder: Any
    log: Any

    @classmethod
    def of(cls, trt: Any) -> Session:
        log = builder_log(trt)
        return cls(trt, trt.Builder(log), log)


def parsed_network(session: Session, onnx: Path) -> tuple[Any, Any]:
    """The network and the parser that holds its weights. Raises NvlmError with every error of the parser."""
    # precision is in the graph; 11 is always strongly typed and may one day drop the flag
    flag = getattr(session.trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = session.builder.create_network(0 if flag is None else 1 << int(flag))
    parser = session.trt.OnnxParser(network, session.log)
    if not parser.parse_from_file(str(onnx)) or parser.num_errors:
        errors = [_parser_error(parser.get_error(index)) for index in range(parser.num_errors)]
        raise NvlmError(f"{onnx}: the parser refuses it:\n{_quoted([*errors, *session.log.errors])}")
    _require_borders(network, onnx)
    return network, parser


def _parser_error(error: Any) -> str:
    place = f"node {error.node_name()!r} ({error.node_operator()}): " if error.node_operator() else ""
    return f"{place}{error.desc()} [{error.code().name}]"


def _quoted(words: list[str]) -> str:
    return "\n".join(f"  | {line}" for word in words for line in word.splitlines())


def _require_borders(network: Any, onnx: Path) -> None:
    inputs = [network.get_input(index).name for index in range(network.num_inputs)]
    outputs = [network.get_output(index).name for index in range(network.num_outputs)]
    if (inputs, outputs) != ([TILES.name], [EMBEDDINGS.name]):
        raise NvlmError(f"{onnx} maps {inputs} to {outputs}: not a vision graph of this tool")


def builder_config(session: Session, request: BuildRequest) -> Any:
    """Nothing here says a precision, and VERSION_COMPATIBLE stays off: a plan belongs to one version."""
    trt, config = session.trt, session.builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.builder_optimization_level = request.optimization_level
    if request.precision == "fp32":
        config.clear_flag(trt.BuilderFlag.TF32)  # on by default; who asks for FP32 does not mean 10 bits of mantissa
    if request.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request.workspace_bytes)
    if request.runtime == TENSORRT_RTX:
        target = getattr(trt.ComputeCapability, "SM" + request.compute_capability.replace(".", ""))
        config.num_compute_capabilities = 1
        config.set_compute_capability(target, 0)
    return config


def optimization_profile(session: Session, network: Any, request: BuildRequest) -> Any:
    _, *tile = network.get_input(0).shape
    profile = session.builder.create_optimization_profile()
    profile.set_shape(TILES.name, *((count, *tile) for count in request.tiles))
    return profile


def timing_cache(request: BuildRequest, version: str) -> Path | None:
    """Where measured kernel times are kept, by cohort: not by SM, for H100 and H200 share one and differ in speed."""
    if request.runtime == TENSORRT_RTX:
        return None  # it measures nothing: its kernels are chosen by a model of the GPU
    return Path(request.cache_folder) / f"{request.runtime}-{version}-{request.sku}.cache"


def use_timing_cache(config: Any, path: Path | None) -> None:
    """Raises NvlmError when the cache is another GPU's or damaged, rather than measuring in silence again."""
    if path is None:
        return
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if not config.set_timing_cache(cache, False):
        raise NvlmError(f"timing cache {path} is of another GPU or damaged", hint=f"rm {path}: it only saves time")


def keep_timing_cache(config: Any, path: Path | None) -> None:
    if path is not None:
        with replace_file(path) as temporary:
            temporary.write_bytes(config.get_timing_cache().serialize())


def write_plan(session: Session, network: Any, config: Any, file: BinaryIO) -> None:
    """Build into a file, piece by piece: as one object the plan would be in memory once more.

    Measured with TensorRT-RTX, beside the mapped weights file: 2.6 GB instead of 4.7 for 4 blocks at full width (2.2 GB
    of BF16 weights), and 13 GB for the full encoder (12.3 GB).

    Raises NvlmError with the builder's errors, OSError when the file cannot be written.
    """
    writer = _file_writer(session.trt, file)
    built = session.builder.build_serialized_network_to_stream(network, config, writer)
    if writer.problem is not None:
        raise writer.problem
    if not built:
        raise NvlmError(f"the builder refuses the graph:\n{_quoted(session.log.errors)}")


def _file_writer(trt: Any, file: BinaryIO) -> Any:
    class FileWriter(trt.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.problem: OSError | None = None

        def write(self, data: bytes) -> int:
            """Bytes written; an exception may not cross the builder's C++, so it waits."""
            try:
                return file.write(data)
            except OSError as problem:
                self.problem = problem
                return 0

    return FileWriter()


def facts(request: BuildRequest, version: str, gpu: str | None, cache: Path | None, seconds: float) -> dict[str, Any]:
    """For the manifest and for whoever loads the plan: it fits one version and one kind of GPU."""
    return {
        "runtime": request.runtime,
        "version": version,
        "sku": request.sku,
        "compute_capability": request.compute_capability,
        "gpu": gpu,
        "precision": request.precision,
        "tiles": request.tiles,
        "optimization_level": request.optimization_level,
        "timing_cache_sha256": None if cache is None else sha256_of(cache),
        "plan_bytes": Path(request.plan).stat().st_size,
        "seconds": round(seconds, 3),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def peak_memory_bytes() -> int:
    """Of this process; getrusage would count its parent's memory at the fork too."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
