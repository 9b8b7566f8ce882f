"""The weights of an ONNX graph in one external-data file: streamed, a few MB in memory at a time, and resumable.

A journal beside the file names every weight that is written whole, with the checksum of its bytes. After a kill the
weights that the file really holds are kept and the others written. The pass that reads the file back gives its SHA-256.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from nvlm_deploy.checkpoint.journal import Journal
from nvlm_deploy.checkpoint.read_back import CHECK_DISK, WrittenAndReadBack, checksum, read_back, settle
from nvlm_deploy.digest import KNOWN_DIGESTS
from nvlm_deploy.errors import MachineError
from nvlm_deploy.progress import Progress, silent

if TYPE_CHECKING:
    import torch

# ONNX Runtime maps a tensor that starts on a page into memory instead of copying it
PAGE_BYTES = 4096


@dataclass(frozen=True)
class Weight:
    """One initialiser of a graph and where its values come from.

    `chunks` gives them in the file's type, in row order, a few MB at a time; it can be called again.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[torch.Tensor]]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Slot:
    """Where one tensor lies in the file."""

    offset: int
    size_bytes: int

    @property
    def bytes(self) -> range:
        return range(self.offset, self.offset + self.size_bytes)


def weight_of_tensor(name: str, tensor: torch.Tensor) -> Weight:
    """A small constant that is in memory anyway."""
    return Weight(name, tensor.dtype, tuple(tensor.shape), lambda: iter((tensor,)))


def slots_of(weights: Iterable[Weight]) -> dict[str, Slot]:
    """A place for each weight, in order and page-aligned."""
    slots, offset = {}, 0
    for weight in weights:
        slots[weight.name] = Slot(offset, weight.size_bytes)
        offset += -(-weight.size_bytes // PAGE_BYTES) * PAGE_BYTES
    return slots


def stream_weights(
    path: Path, weights: Sequence[Weight], *, identity: str, on_progress: Progress = silent
) -> dict[str, Slot]:
    """Write all weights into the file at `path`, then read all of it back and compare checksums.

    `identity` names the source and the choices: a file begun with another one is begun anew. Raises MachineError when
    the file differs from what was written; what a weight's own reading raises passes through.
    """
    slots = slots_of(weights)
    journal = Journal(path.parent, identity)
    report = WrittenAndReadBack("vision weights", sum(slot.size_bytes for slot in slots.values()), on_progress)
    with _opened(path, fresh=not journal.finished) as file:
        _allocate(file, slots)
        _keep_intact(journal, path.name, file, slots)
        report.add(sum(slots[name].size_bytes for name in journal.of_file(path.name)))
        for weight in [weight for weight in weights if (path.name, weight.name) not in journal.finished]:
            journal.add((path.name, weight.name), _write(file, weight, slots[weight.name], report))
        sha256 = _verified(path, file, slots, journal.of_file(path.name), report)
    KNOWN_DIGESTS.remember(path, sha256)
    return slots


def _keep_intact(journal: Journal, name: str, file: BinaryIO, slots: Mapping[str, Slot]) -> None:
    """Of what a killed run finished, only what the file holds."""
    finished = {weight: found for weight, found in journal.of_file(name).items() if weight in slots}
    intact = {weight: checksum(file.fileno(), slots[weight].bytes) == found for weight, found in finished.items()}
    journal.keep({(name, weight): is_intact for weight, is_intact in intact.items()})


def _opened(path: Path, *, fresh: bool) -> BinaryIO:
    return path.open("w+b" if fresh or not path.exists() else "r+b")


def _allocate(file: BinaryIO, slots: Mapping[str, Slot]) -> None:
    """A disk that is too small should be found out before the first byte, not after ten minutes."""
    end = max((slot.offset + slot.size_bytes for slot in slots.values()), default=0)
    if end:
        os.posix_fallocate(file.fileno(), 0, end)
    file.truncate(end)


def _write(file: BinaryIO, weight: Weight, slot: Slot, report: WrittenAndReadBack) -> int:
    """The checksum of what was written. Raises ValueError when the chunks are not what the weight says."""
    found, written = 0, 0
    file.seek(slot.offset)
    for chunk in weight.chunks():
        data = _bytes_of(chunk)
        if chunk.dtype != weight.dtype or written + len(data) > slot.size_bytes:
            raise ValueError(f"{weight.name}: a chunk of {chunk.dtype}, {len(data)} bytes, in a slot for {weight}")
        file.write(data)
        found, written = zlib.crc32(data, found), written + len(data)
        report.add(len(data))
    if written != slot.size_bytes:
        raise ValueError(f"{weight.name}: {written} bytes, its slot has {slot.size_bytes}")
    file.flush()
    return found


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """Memory order: little-endian, as ONNX wants it, on every machine this runs on."""
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _verified(
    path: Path, file: BinaryIO, slots: Mapping[str, Slot], expected: Mapping[str, int], report: WrittenAndReadBack
) -> str:
    """SHA-256 of the file, whose weights are what was written."""
    settle(file.fileno())
    found = read_back(file.fileno(), {name: slot.bytes for name, slot in slots.items()}, report.add)
    for name in found.differing(expected):
        raise MachineError(f"{name} read back from {path} differs from what was written", hint=CHECK_DISK)
    return found.sha256
