"""Vision graphs of every precision, exported once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PRECISIONS = ("fp32", "bf16", "fp16", "fp8")
BLOCKS = 2

ExportOf = Callable[..., Path]


@pytest.fixture(scope="session")
def export_vision(tmp_path_factory, traced_once) -> ExportOf:
    """vision.onnx of a checkpoint in a precision; FP8 is calibrated with noise and flat tiles. Do not write to it."""
    import numpy as np

    from nvlm_deploy.model.spec import spec_from_checkpoint
    from nvlm_deploy.vision.export import Fp8Source, onnx_from_checkpoint
    from nvlm_deploy.vision.numerics.compare import noise_tiles
    from nvlm_deploy.vision.qdq import Fp8Choice

    done: dict[tuple[Path, str, bool], Path] = {}

    def export(checkpoint: Any, precision: str, *, attention: bool = False) -> Path:
        key = (checkpoint.folder, precision, attention)
        if key not in done:
            done[key] = fresh(checkpoint, precision, attention)
        return done[key]

    def fresh(checkpoint: Any, precision: str, attention: bool) -> Path:
        spec = spec_from_checkpoint(checkpoint)
        size = spec.tiling.tile_size
        flat = [np.full((1, size, size, 3), level, np.uint8) for level in (0, 128, 255)]
        pictures = [*(noise_tiles(7, size, seed=seed) for seed in range(1, 5)), *flat]
        fp8 = Fp8Source(Fp8Choice(attention=attention), pictures) if precision == "fp8" else None
        folder = tmp_path_factory.mktemp(f"vision_{precision}") / "vision"
        with traced_once():
            return onnx_from_checkpoint(checkpoint, spec, folder, precision=precision, fp8=fp8)

    return export


@pytest.fixture(scope="session")
def short_checkpoint(make_checkpoint):
    """Two random blocks, dummy heads zero. Do not write to it."""
    return make_checkpoint(vision_layers=BLOCKS, decoder_layers=1)


@pytest.fixture(scope="session")
def kept_checkpoint(make_checkpoint):
    """Two random blocks whose dummy heads hold noise, so that they stay in the graph. Do not write to it."""
    import torch

    def disturb(weights) -> None:
        noise = torch.Generator().manual_seed(1)
        for name in [name for name in weights if name.startswith("vision_model.")]:
            if name.endswith("attn.qkv.weight"):
                weights[name] = (torch.randn(weights[name].shape, generator=noise) / 11).to(torch.bfloat16)
            elif name.endswith(("q_norm.weight", "k_norm.weight")):
                weights[name].fill_(1.5)

    return make_checkpoint(vision_layers=BLOCKS, decoder_layers=1, edit=disturb)
