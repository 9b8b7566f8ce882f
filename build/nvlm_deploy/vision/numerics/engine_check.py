"""The engine that is served, judged at its end: what an optimiser makes of a graph that passed may be another thing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from nvlm_deploy.errors import MachineError, NvlmError, RejectedError
from nvlm_deploy.vision.engine import OnnxRuntimeEngine
from nvlm_deploy.vision.numerics.bounds import end_bounds
from nvlm_deploy.vision.numerics.compare import Difference, difference


def require_engine(
    onnx: Path,
    tiles: npt.NDArray[np.uint8],
    expected: npt.NDArray[np.float32],
    precision: str,
    *,
    threads: int | None = None,
) -> Difference:
    """The embeddings of a graph as ONNX Runtime serves it, optimised, beside the reference's [tiles, tokens, hidden].

    `tiles` uint8 [tiles, S, S, 3] go in by one and together. Raises RejectedError when a tile's cosine is below the
    precision's bound, or the engine cannot be run on so many tiles.
    """
    try:
        engine = OnnxRuntimeEngine(onnx, threads=threads)
        found = [(engine(tiles[:1]), expected[:1]), (engine(tiles), expected)]
    except MachineError:
        raise
    except NvlmError as problem:
        raise RejectedError(f"the engine {onnx.name} does not run: {problem.message}") from problem
    for embeddings, wanted in found:
        result = _difference(embeddings, wanted)
        broken = end_bounds(precision).broken(result)
        if broken:
            raise RejectedError(
                f"ONNX Runtime makes something else of {onnx.name}, whose graph passes its gate: {', '.join(broken)}",
                hint="try another release of onnxruntime",
            )
    return result


def _difference(found: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> Difference:
    if found.shape != expected.shape:
        raise RejectedError(f"the engine gives {list(found.shape)}, expected {list(expected.shape)}")
    return difference(torch.from_numpy(found), torch.from_numpy(expected))
