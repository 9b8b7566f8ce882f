"""The engine behind the Triton model `vision_encoder`: ONNX Runtime on the CPU, or a TensorRT plan on the GPU."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nvlm_deploy.errors import MachineError, NvlmError
from nvlm_deploy.fingerprint import require_fitting_repository
from nvlm_deploy.serving.settings import PLAN_FILE, VISION_FILE
from nvlm_deploy.tensors import EMBEDDINGS, TILES

if TYPE_CHECKING:
    import torch

# the profile's runtime -> the Python modules that can run its plan; the first that is installed does
PLAN_RUNTIMES = {"tensorrt": ("tensorrt",), "tensorrt_rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}


class VisionEngine(Protocol):
    """uint8 tiles [tiles, S, S, 3] to embeddings [tiles, tokens, hidden] where the engine computes them."""

    tile_size: int

    def __call__(self, tiles: NDArray[np.uint8]) -> torch.Tensor: ...


def open_engine(folder: Path, runtime: str, *, threads: int) -> VisionEngine:
    """The engine in a folder. Raises NvlmError for one of another kind or version, MachineError without its runtime."""
    if runtime in PLAN_RUNTIMES:
        return PlanEngine(folder / PLAN_FILE, runtime)
    return OnnxEngine(folder / VISION_FILE, threads=threads)


class OnnxEngine:
    """An ONNX Runtime session on the CPU with a bounded number of threads that do not spin while idle."""

    def __init__(self, onnx: Path, *, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(str(onnx), options, providers=["CPUExecutionProvider"])
        self.tile_size: int = self.session.get_inputs()[0].shape[1]

    def __call__(self, tiles: NDArray[np.uint8]) -> torch.Tensor:
        import torch

        (embeddings,) = self.session.run([EMBEDDINGS.name], {TILES.name: tiles})
        return torch.from_numpy(np.asarray(embeddings))


class PlanEngine:
    """A TensorRT or TensorRT-RTX plan on the first GPU, on a stream of its own; of another machine it is refused.

    Not run so far: no GPU was at hand (engines/EVIDENCE.md). That the calls exist is tested on TensorRT-RTX's module.
    """

    def __init__(self, plan: Path, runtime: str) -> None:
        import torch

        if not torch.cuda.is_available():
            raise MachineError(f"{plan.name} needs a GPU, and there is none here", hint="`nvlm build` with profile cpu")
        require_fitting_repository(plan.parent)
        trt = _module(runtime)
        self.engine = trt.Runtime(trt.Logger(trt.Logger.WARNING)).deserialize_cuda_engine(plan.read_bytes())
        if self.engine is None:
            raise NvlmError(
                f"{plan} was not built for this GPU or by this {runtime} ({trt.__version__})",
                hint="build the profile again on this machine: plans are bound to GPU and version",
            )
        self.context: Any = self.engine.create_execution_context()
        self.stream = torch.cuda.Stream()
        self.tile_size: int = self.engine.get_tensor_shape(TILES.name)[1]

    def __call__(self, tiles: NDArray[np.uint8]) -> torch.Tensor:
        import torch

        with torch.cuda.stream(self.stream):
            source = torch.from_numpy(tiles).cuda(non_blocking=True)
            if not self.context.set_input_shape(TILES.name, tuple(source.shape)):
                raise NvlmError(f"the engine takes no {len(tiles)} tiles in a run", hint="raise max_tiles_per_run")
            shape = tuple(self.context.get_tensor_shape(EMBEDDINGS.name))
            embeddings = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
            self.context.set_tensor_address(TILES.name, source.data_ptr())
            self.context.set_tensor_address(EMBEDDINGS.name, embeddings.data_ptr())
            if not self.context.execute_async_v3(self.stream.cuda_stream):
                raise MachineError("the vision engine failed to run", hint="TensorRT's reason is in the server's log")
        self.stream.synchronize()
        return embeddings


def _module(runtime: str) -> Any:
    for name in PLAN_RUNTIMES[runtime]:
        if importlib.util.find_spec(name) is not None:
            return importlib.import_module(name)
    raise MachineError(f"no Python module {PLAN_RUNTIMES[runtime][0]!r} here: it runs the vision engine")
