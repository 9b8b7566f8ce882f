"""Write safetensors so that a crash leaves nothing half-written, and what was written is what was meant."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from nvlm_deploy.artifacts import replace_file, write_text
from nvlm_deploy.checkpoint.reader import INDEX_NAME
from nvlm_deploy.errors import MachineError

if TYPE_CHECKING:
    import torch


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """One file: written beside its place, read back and compared bit for bit, then renamed."""
    from safetensors.torch import save_file

    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with replace_file(path) as temporary:
        save_file(contiguous, temporary, metadata={"format": "pt"})
        temporary.chmod(0o644)  # safetensors makes it 0600, which a server under another user could not read
        _require_same(temporary, contiguous)


def write_shards(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], *, max_shard_bytes: int) -> None:
    """Shards `model-0000k-of-0000n.safetensors` of at most max_shard_bytes (or one tensor) and their index."""
    groups = _groups(tensors, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        write_safetensors(folder / name, group)
        weight_map |= dict.fromkeys(group, name)
    total = sum(tensor.nbytes for group in groups for tensor in group.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_text(folder / INDEX_NAME, json.dumps(index, indent=2) + "\n")


def _groups(tensors: Iterable[tuple[str, torch.Tensor]], max_bytes: int) -> list[dict[str, torch.Tensor]]:
    groups: list[dict[str, torch.Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors:
        if groups[-1] and filled + tensor.nbytes > max_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = tensor
        filled += tensor.nbytes
    return groups


def _require_same(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Compares bytes, so that NaN equals itself and -0.0 does not equal 0.0."""
    import torch
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        for name, tensor in tensors.items():
            written = file.get_tensor(name).reshape(-1)
            if not torch.equal(written.view(torch.uint8), tensor.reshape(-1).view(torch.uint8)):
                raise MachineError(f"{name} read back from {path} differs from what was written", hint="check the disk")
