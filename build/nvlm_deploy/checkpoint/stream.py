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

from nvlm_deploy.checkpoint.read_back import CHECK_DISK, checksum
from nvlm_deploy.errors import MachineError

if TYPE_CHECKING:
    import torch

# safetensors' name -> torch's, and bytes of an element
DTYPES = {
    "F32": ("torch.float32", 4),
    "BF16": ("torch.bfloat16", 2),
    "F16": ("torch.float16", 2),
    "F8_E4M3": ("torch.float8_e4m3fn", 1),
}


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Of a tensor of safetensors' type `dtype`."""
    return DTYPES[dtype][1] * prod(shape)


# name -> (dtype, shape)
Tensors = Mapping[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Place:
    """Where a tensor lies, counted from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int

    @property
    def size_bytes(self) -> int:
        return tensor_bytes(self.dtype, self.shape)


@dataclass(frozen=True)
class TensorStream:
    """An open file with its header written; every tensor of the header is to be put once, in any order."""

    path: Path
    file: BinaryIO
    data_start: int
    places: Mapping[str, Place]
    checksums: dict[str, int] = field(default_factory=dict)

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor; ValueError when it is not what the header says."""
        import torch

        place = self.places[name]
        require_dtype(name, place, tensor)
        if tuple(tensor.shape) != place.shape:
            raise _misfit(name, place, tensor)
        if name in self.checksums:
            raise ValueError(f"{name} put twice")
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        self.file.seek(self.data_start + place.begin)
        self.file.write(data)
        self.checksums[name] = zlib.crc32(data)

    def verify(self) -> None:
        """Read everything back from the file. Raises MachineError when the disk gives back other bytes."""
        unwritten = self.places.keys() - self.checksums.keys()
        if unwritten:
            raise ValueError(f"{self.path.name}: {len(unwritten)} tensors never written, as {min(unwritten)}")
        self.file.flush()
        for name, place in self.places.items():
            begin = self.data_start + place.begin
            if checksum(self.file.fileno(), range(begin, begin + place.size_bytes)) != self.checksums[name]:
                raise MachineError(f"{name} read back from {self.path} differs from what was written", hint=CHECK_DISK)


def require_dtype(name: str, place: Place, tensor: torch.Tensor) -> None:
    if str(tensor.dtype) != DTYPES[place.dtype][0]:
        raise _misfit(name, place, tensor)


def _misfit(name: str, place: Place, tensor: torch.Tensor) -> ValueError:
    expected = f"{DTYPES[place.dtype][0]} {list(place.shape)}"
    return ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, its place is for {expected}")


@contextmanager
def tensor_stream(path: Path, tensors: Tensors) -> Iterator[TensorStream]:
    """A new file at `path` for the named (dtype, shape); read back when the block ends.

    The caller makes it atomic, as by writing into a folder of `artifacts.replace_folder`.
    """
    places = places_of(tensors)
    header = header_of(places)
    with path.open("w+b") as file:
        file.write(header)
        stream = TensorStream(path, file, len(header), places)
        yield stream
        stream.verify()


def places_of(tensors: Tensors) -> dict[str, Place]:
    """In safetensors' own order: wider types first, so that every tensor is aligned."""
    places: dict[str, Place] = {}
    begin = 0
    for name in sorted(tensors, key=lambda name: (-DTYPES[tensors[name][0]][1], name)):
        places[name] = Place(*tensors[name], begin)
        begin += places[name].size_bytes
    return places


def header_of(places: Mapping[str, Place]) -> bytes:
    """All that stands before the data, its own length first."""
    entries = {
        name: {
            "dtype": place.dtype,
            "shape": list(place.shape),
            "data_offsets": [place.begin, place.begin + place.size_bytes],
        }
        for name, place in places.items()
    }
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header
