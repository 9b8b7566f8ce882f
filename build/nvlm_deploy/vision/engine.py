"""Runs an exported vision graph in ONNX Runtime."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nvlm_deploy.errors import MachineError, NvlmError
from nvlm_deploy.places import require_file
from nvlm_deploy.tensors import EMBEDDINGS, TILES

# A tile of the released model takes about 300 MB of float32 activations: 25 heads of 1025 x 1025 scores, and the MLP's
TILES_PER_RUN = 8
# in ONNX Runtime's words; what says where in its sources it noticed something helps nobody
_NOISE = (r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", r"Status Message: \S*/onnxruntime\S* .* was false\. ")
_NO_MEMORY = ("Failed to allocate memory", "bad_alloc", "bad allocation")


class OnnxRuntimeEngine:
    """uint8 tiles to float32 embeddings; memory is bounded whatever the number of tiles."""

    def __init__(self, onnx_path: Path, *, threads: int | None = None) -> None:
        """Load the graph. `threads=None` uses every core. Raises NvlmError when it is missing or not a vision graph."""
        import onnxruntime

        require_file(onnx_path, "vision graph", hint="build it: `nvlm build`")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or 0
        try:
            self._session = onnxruntime.InferenceSession(onnx_path, options, providers=["CPUExecutionProvider"])
        except Exception as problem:  # ONNX Runtime's exception classes are private
            raise NvlmError(f"{onnx_path} cannot be loaded: {problem}", hint="build it again with --force") from problem
        (tiles,), (embeddings,) = self._session.get_inputs(), self._session.get_outputs()
        if (tiles.name, embeddings.name) != (TILES.name, EMBEDDINGS.name):
            raise NvlmError(f"{onnx_path} maps {tiles.name} to {embeddings.name}: not a vision graph of this tool")
        self.tile_shape: tuple[int, ...] = tuple(tiles.shape[1:])
        self.embedding_shape: tuple[int, ...] = tuple(embeddings.shape[1:])

    def __call__(self, tiles: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """uint8 [n, S, S, 3] -> float32 [n, tokens, hidden]; none needs no run.

        Raises NvlmError for other shapes, and when the graph cannot be run.
        """
        if tiles.dtype != np.uint8 or tiles.shape[1:] != self.tile_shape:
            raise NvlmError(f"tiles are {tiles.dtype} {list(tiles.shape)}, expected uint8 {['n', *self.tile_shape]}")
        embeddings = np.empty((len(tiles), *self.embedding_shape), dtype=np.float32)
        for start in range(0, len(tiles), TILES_PER_RUN):
            chunk = slice(start, start + TILES_PER_RUN)
            embeddings[chunk] = self._run(tiles[chunk])
        return embeddings

    def _run(self, tiles: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        try:
            found: list[npt.NDArray[np.float32]] = self._session.run([EMBEDDINGS.name], {TILES.name: tiles})
        except Exception as problem:  # ONNX Runtime's exception classes are private
            raise _failure(f"the vision graph cannot be run on {len(tiles)} tiles", problem) from problem
        return found[0]


def run_graph(
    graph: bytes,
    inputs: Mapping[str, npt.NDArray[Any]],
    outputs: Sequence[str],
    *,
    data_folder: Path,
    threads: int | None = None,
) -> list[npt.NDArray[np.float32]]:
    """Run a serialised graph once, operator by operator as it is written: nothing is fused or folded.

    Its external weights are mapped from files in `data_folder`. Raises NvlmError when it cannot be loaded or run,
    MachineError when memory is too small for it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads or 0
    options.enable_cpu_mem_arena = False  # it would keep every cast weight until the end
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(data_folder))
    try:
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        found: list[npt.NDArray[np.float32]] = session.run(list(outputs), dict(inputs))
    except Exception as problem:  # ONNX Runtime's exception classes are private
        raise _failure("it cannot be run", problem) from problem
    return found


def _failure(what: str, problem: Exception) -> NvlmError:
    """The graph's fault, in ONNX Runtime's words, unless memory was too small."""
    words = re.sub("|".join(_NOISE), "", str(problem).strip()).splitlines()
    message = f"{what}: {words[0] if words else type(problem).__name__}"
    if any(sign in str(problem) for sign in _NO_MEMORY):
        return MachineError(message, hint="free memory, or look at fewer tiles")
    return NvlmError(message)
