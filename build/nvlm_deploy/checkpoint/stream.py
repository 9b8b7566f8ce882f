"""One safetensors file written tensor by tensor, for files that are larger than memory."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from nvlm_deploy.errors import MachineError

if TYPE_CHECKING:
    import torch

# in safetensors' own order: wider types first, so that every tensor is aligned
_DTYPE_BYTES = {"F32": 4, "BF16": 2, "F8_E4M3": 1}
_READ_BACK_BYTES = 1 << 24


@dataclass
class TensorStream:
    """An open file with its header written; every tensor of the header is to be put once, in any order."""

    path: Path
    file: BinaryIO
    places: Mapping[str, tuple[int, int]]
    checksums: dict[str, int] = field(default_factory=dict)

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor; ValueError when it is not what the header says."""
        import torch

        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        offset, size = self.places[name]
        if data.nbytes != size or name in self.checksums:
            raise ValueError(f"{name}: {data.nbytes} bytes for a place of {size}, or put twice")
        self.file.seek(offset)
        self.file.write(data.data)
        self.checksums[name] = zlib.crc32(data.data)

    def verify(self) -> None:
        """Read everything back from the file. Raises MachineError when the disk gives back other bytes."""
        unwritten = self.places.keys() - self.checksums.keys()
        if unwritten:
            raise ValueError(f"{self.path.name}: {len(unwritten)} tensors never written, as {min(unwritten)}")
        self.file.flush()
        for name, (offset, size) in self.places.items():
            if self._checksum(offset, size) != self.checksums[name]:
                raise MachineError(
                    f"{name} read back from {self.path} differs from what was written", hint="check the disk"
                )

    def _checksum(self, offset: int, size: int) -> int:
        self.file.seek(offset)
        checksum = 0
        for start in range(0, size, _READ_BACK_BYTES):
            checksum = zlib.crc32(self.file.read(min(_READ_BACK_BYTES, size - start)), checksum)
        return checksum


@contextmanager
def tensor_stream(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> Iterator[TensorStream]:
    """A new file at `path` for the named (dtype, shape); read back when the block ends.

    The caller makes it atomic, as by writing into a folder of `artifacts.replace_folder`.
    """
    order = sorted(tensors, key=lambda name: (-_DTYPE_BYTES[tensors[name][0]], name))
    ends = {}
    end = 0
    for name in order:
        dtype, shape = tensors[name]
        begin, end = end, end + _DTYPE_BYTES[dtype] * prod(shape)
        ends[name] = (begin, end)
    entries = {
        name: {"dtype": tensors[name][0], "shape": list(tensors[name][1]), "data_offsets": list(ends[name])}
        for name in order
    }
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    start = 8 + len(header)
    with path.open("w+b") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        places = {name: (start + begin, stop - begin) for name, (begin, stop) in ends.items()}
        stream = TensorStream(path, file, places)
        yield stream
        stream.verify()
