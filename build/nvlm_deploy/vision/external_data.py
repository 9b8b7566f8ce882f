"""The weights of an ONNX graph in one external-data file: streamed, a few MB in memory at a time, and resumable.

A journal beside the file names every weight that is written whole, with the checksum of its bytes. After a kill the
weights that the file really holds are kept and the others written.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from nvlm_deploy.errors import MachineError
from nvlm_deploy.progress import Progress, silent

if TYPE_CHECKING:
    import torch

# ONNX Runtime maps a tensor that starts on a page into memory instead of copying it
PAGE_BYTES = 4096
_READ_BYTES = 1 << 24


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
    """Write all weights into the file at `path`, then read back what was written and compare checksums.

    `identity` names the source and the choices: a file begun with another one is begun anew. Raises MachineError when
    the file differs from what was written; what a weight's own reading raises passes through.
    """
    slots = slots_of(weights)
    journal = _Journal(path.with_name(f"{path.name}.journal"), identity)
    with _opened(path, fresh=not journal.finished) as file:
        _allocate(file, slots)
        found = {name for name, checksum in journal.finished.items() if _checksum(file, slots[name]) == checksum}
        report = _Report(on_progress, sum(slots[name].size_bytes for name in found), 2 * _total_bytes(slots))
        missing = [weight for weight in weights if weight.name not in found]
        for weight in missing:
            journal.add(weight.name, _write(file, weight, slots[weight.name], report))
        _settle(file)
        _require_written(path, file, {weight.name: slots[weight.name] for weight in missing}, journal, report)
    journal.path.unlink(missing_ok=True)
    return slots


class _Journal:
    """Finished weights and their checksums, a JSON line each; a line cut off by a kill does not count."""

    def __init__(self, path: Path, identity: str) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        entries = list(_entries(lines))
        ours = entries[:1] == [["identity", identity]]
        self.finished: dict[str, int] = {name: int(checksum) for name, checksum in entries[1:]} if ours else {}
        if not ours:
            path.write_text(json.dumps(["identity", identity]) + "\n", encoding="utf-8")

    def add(self, name: str, checksum: int) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([name, checksum]) + "\n")
        self.finished[name] = checksum


def _entries(lines: list[str]) -> Iterator[list[str]]:
    for line in lines:
        try:
            name, value = json.loads(line)
        except ValueError:
            return
        yield [name, value]


class _Report:
    """Bytes written and bytes read back, as one work of twice the size."""

    def __init__(self, on_progress: Progress, kept_bytes: int, total_bytes: int) -> None:
        self.on_progress, self.done, self.total = on_progress, 2 * kept_bytes, total_bytes

    def add(self, size_bytes: int) -> None:
        self.done += size_bytes
        self.on_progress("vision weights", self.done, self.total)


def _total_bytes(slots: Mapping[str, Slot]) -> int:
    return sum(slot.size_bytes for slot in slots.values())


def _opened(path: Path, *, fresh: bool) -> BinaryIO:
    return path.open("w+b" if fresh or not path.exists() else "r+b")


def _allocate(file: BinaryIO, slots: Mapping[str, Slot]) -> None:
    """A disk that is too small should be found out before the first byte, not after ten minutes."""
    end = max((slot.offset + slot.size_bytes for slot in slots.values()), default=0)
    if end:
        os.posix_fallocate(file.fileno(), 0, end)
    file.truncate(end)


def _write(file: BinaryIO, weight: Weight, slot: Slot, report: _Report) -> int:
    """The checksum of what was written. Raises ValueError when the chunks are not what the weight says."""
    checksum, written = 0, 0
    file.seek(slot.offset)
    for chunk in weight.chunks():
        data = _bytes_of(chunk)
        if chunk.dtype != weight.dtype or written + len(data) > slot.size_bytes:
            raise ValueError(f"{weight.name}: a chunk of {chunk.dtype}, {len(data)} bytes, in a slot for {weight}")
        file.write(data)
        checksum, written = zlib.crc32(data, checksum), written + len(data)
        report.add(len(data))
    if written != slot.size_bytes:
        raise ValueError(f"{weight.name}: {written} bytes, its slot has {slot.size_bytes}")
    file.flush()
    return checksum


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """Memory order: little-endian, as ONNX wants it, on every machine this runs on."""
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _settle(file: BinaryIO) -> None:
    """To the disk, and out of the page cache: reading back should read the disk."""
    file.flush()
    os.fsync(file.fileno())
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _require_written(path: Path, file: BinaryIO, slots: Mapping[str, Slot], journal: _Journal, report: _Report) -> None:
    for name, slot in slots.items():
        if _checksum(file, slot) != journal.finished[name]:
            raise MachineError(f"{name} read back from {path} differs from what was written", hint="check the disk")
        report.add(slot.size_bytes)


def _checksum(file: BinaryIO, slot: Slot) -> int:
    file.seek(slot.offset)
    checksum = 0
    for start in range(0, slot.size_bytes, _READ_BYTES):
        checksum = zlib.crc32(file.read(min(_READ_BYTES, slot.size_bytes - start)), checksum)
    return checksum
