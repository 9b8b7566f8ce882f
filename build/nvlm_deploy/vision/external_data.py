"""The weights of an ONNX graph in one external-data file, streamed: one tensor in memory at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nvlm_deploy.errors import MachineError, NvlmError

if TYPE_CHECKING:
    import torch

# reads one tensor as the file holds it: the graph's shape and element type
ReadTensor = Callable[[str], "torch.Tensor"]

# ONNX Runtime maps a tensor that starts on a page into memory instead of copying it
PAGE_BYTES = 4096


@dataclass(frozen=True)
class Slot:
    """Where one tensor lies in the file."""

    offset: int
    size_bytes: int


def slots_of(parameters: Mapping[str, torch.Tensor]) -> dict[str, Slot]:
    """A place for each parameter, in order and page-aligned; shapes and types suffice, so they may be on `meta`."""
    slots, offset = {}, 0
    for name, parameter in parameters.items():
        slots[name] = Slot(offset, parameter.nbytes)
        offset += -(-parameter.nbytes // PAGE_BYTES) * PAGE_BYTES
    return slots


def stream_tensors(path: Path, parameters: Mapping[str, torch.Tensor], read: ReadTensor) -> dict[str, Slot]:
    """Write every parameter's weights, then read the file back and compare it with a second reading of them.

    Raises NvlmError naming a tensor that holds NaN or infinity, MachineError when the file differs from what was meant.
    """
    slots = slots_of(parameters)
    with path.open("wb") as file:
        for name, slot in slots.items():
            file.seek(slot.offset)
            file.write(_checked_bytes(name, parameters[name], read).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    _require_same(path, slots, read)
    return slots


def _checked_bytes(name: str, parameter: torch.Tensor, read: ReadTensor) -> torch.Tensor:
    tensor = read(name)
    _require_as_planned(name, tensor, parameter)
    _require_finite(name, tensor)
    return _bytes_of(tensor)


def _require_same(path: Path, slots: Mapping[str, Slot], read: ReadTensor) -> None:
    """The file is mapped, not read: it takes no memory that the next tensor could need."""
    import torch

    content = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
    for name, slot in slots.items():
        if not torch.equal(content[slot.offset : slot.offset + slot.size_bytes], _bytes_of(read(name))):
            raise MachineError(f"{name} read back from {path} differs from the checkpoint", hint="check the disk")


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """uint8 in memory order: little-endian, as ONNX wants it, on every machine this runs on."""
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _require_as_planned(name: str, tensor: torch.Tensor, parameter: torch.Tensor) -> None:
    if (tensor.shape, tensor.dtype) != (parameter.shape, parameter.dtype):
        raise ValueError(
            f"{name} is {tensor.dtype} {list(tensor.shape)}, the graph has {parameter.dtype} {list(parameter.shape)}"
        )


def _require_finite(name: str, tensor: torch.Tensor) -> None:
    """By the extremes first: NaN becomes both of them, and `isfinite` would take as much memory as the tensor."""
    if tensor.numel() and not all(extreme.isfinite() for extreme in tensor.aminmax()):
        bad = int((~tensor.isfinite()).sum())
        raise NvlmError(
            f"tensor {name} holds {bad} value(s) that are NaN or infinite",
            hint="the checkpoint is damaged: compare its shards' SHA-256 with the publisher's and fetch them again",
        )
