"""A checkpoint of the released shapes with invented weights, for benchmarks: the encoder and the projector only.

python tests/bench/synthetic.py FOLDER [LAYERS]
"""

from __future__ import annotations

import copy
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

from nvlm_deploy.checkpoint.reader import INDEX_NAME
from nvlm_deploy.checkpoint.stream import tensor_stream
from nvlm_deploy.model.inventory import vision_tensors
from nvlm_deploy.model.released import NVLM_D_72B
from nvlm_deploy.model.spec import VisionSpec, spec_from_config
from nvlm_deploy.vision.heads import PADDED_TENSORS

RELEASED_LAYERS = 45
SHARD_BYTES = 5_000_000_000
# one block of noise serves all tensors, each from another place: making 13 GB of noise would take minutes
NOISE_VALUES = 1 << 26


def released_config(vision_layers: int = RELEASED_LAYERS) -> dict[str, Any]:
    """config.json of the release as the planner knows it, to be changed freely."""
    config = copy.deepcopy(dict(NVLM_D_72B))
    config["vision_config"]["num_hidden_layers"] = vision_layers
    return config


def write_checkpoint(folder: Path, vision_layers: int = RELEASED_LAYERS) -> None:
    """BF16 shards of the encoder, 25 real and 7 zero dummy heads, and of the projector; config.json and the index."""
    folder.mkdir(parents=True)
    spec = spec_from_config(released_config(vision_layers), padded_heads=32)
    noise = torch.randn(NOISE_VALUES, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(_shards(vision_tensors(spec)), start=1):
        shard = f"model-{number:05d}.safetensors"
        with tensor_stream(folder / shard, {name: ("BF16", shape) for name, shape in names.items()}) as stream:
            for name, shape in names.items():
                stream.put(name, _tensor(name, shape, noise, spec.vision))
        weight_map |= dict.fromkeys(names, shard)
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(released_config(vision_layers), indent=2))


def _shards(tensors: dict[str, tuple[int, ...]]) -> list[dict[str, tuple[int, ...]]]:
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in tensors.items():
        size_bytes = 2 * math.prod(shape)
        if filled + size_bytes > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += size_bytes
    return shards


def _tensor(name: str, shape: tuple[int, ...], noise: torch.Tensor, vision: VisionSpec) -> torch.Tensor:
    """Of a size that keeps activations near one; zero in the dummy heads."""
    if name.endswith(("ls1", "ls2")):
        tensor = torch.full(shape, 0.1)
    elif name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "mlp1.0.weight")):
        tensor = 1 + 0.1 * _noise(name, shape, noise).float()
    elif len(shape) == 1:
        tensor = 0.1 * _noise(name, shape, noise).float()
    else:
        tensor = _noise(name, shape, noise).mul_((math.prod(shape[1:]) or 1) ** -0.5)
    if name.endswith(PADDED_TENSORS):
        tensor = tensor.clone()
        real, width = vision.heads * vision.head_size, vision.attention_width
        if name.endswith("attn.qkv.weight"):
            tensor.view(3, width, -1)[:, real:] = 0
        else:
            tensor[..., real:] = 0
    return tensor.to(torch.bfloat16)


def _noise(name: str, shape: tuple[int, ...], noise: torch.Tensor) -> torch.Tensor:
    """The same values for the same name, others for every other."""
    start = hash_of(name) % (NOISE_VALUES // 2)
    count = math.prod(shape)
    repeats = -(-(start + count) // NOISE_VALUES)
    return noise.repeat(repeats)[start : start + count].reshape(shape).clone()


def hash_of(name: str) -> int:
    """Stable over processes, unlike hash()."""
    import zlib

    return zlib.crc32(name.encode())


if __name__ == "__main__":
    write_checkpoint(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else RELEASED_LAYERS)
