"""Is an exported vision graph the network that was exported? Judged by what it computes after being read back."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from nvlm_deploy.checkpoint.reader import Checkpoint
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.model.spec import ModelSpec
from nvlm_deploy.vision.engine import OnnxRuntimeEngine

if TYPE_CHECKING:
    from nvlm_deploy.model.vision import VisionTower

log = logging.getLogger(__name__)

# one tile, one more, and a full image with its thumbnail
TILE_COUNTS = (1, 2, 7)
COSINE_BOUND = 0.99999


def require_equal_to_torch(
    onnx_path: Path, checkpoint: Checkpoint, spec: ModelSpec, *, tile_counts: Sequence[int] = TILE_COUNTS
) -> float:
    """The lowest cosine over tiles against torch on the checkpoint as it is, dummy heads included.

    Raises NvlmError when a tile's cosine is not above 0.99999.
    """
    from nvlm_deploy.model.vision import vision_tower_from_checkpoint

    engine, tower = OnnxRuntimeEngine(onnx_path), vision_tower_from_checkpoint(checkpoint, spec)
    lowest = 1.0
    for count in tile_counts:
        tiles = noise_tiles(count, spec.tiling.tile_size)
        found = cosines(engine(tiles), _embeddings(tower, tiles))
        if not found.min() > COSINE_BOUND:  # NaN is not above it either
            raise NvlmError(
                f"{onnx_path.name} differs from torch: cosine {found.min():.6f} at tile {found.argmin() + 1} of "
                f"{count}, expected above {COSINE_BOUND}"
            )
        lowest = min(lowest, float(found.min()))
    log.info("%s equals torch at %s tiles: cosine at least %.8f", onnx_path.name, tuple(tile_counts), lowest)
    return lowest


def noise_tiles(count: int, size: int, *, seed: int = 0) -> npt.NDArray[np.uint8]:
    """uint8 [count, size, size, 3], every pixel value equally likely."""
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def cosines(found: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Cosine similarity of each tile's embeddings, [tiles] from two [tiles, tokens, hidden]."""
    a, b = (array.reshape(len(array), -1).astype(np.float64) for array in (found, expected))
    similarity: npt.NDArray[np.float64] = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return similarity


def _embeddings(tower: VisionTower, tiles: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    import torch

    with torch.inference_mode():
        embeddings: npt.NDArray[np.float32] = tower(torch.from_numpy(tiles)).float().numpy()
    return embeddings
