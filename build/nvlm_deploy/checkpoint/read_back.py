"""What was written, read again from the disk: one pass gives the checksum of every part and the file's SHA-256."""

from __future__ import annotations

import hashlib
import os
import threading
import zlib
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from nvlm_deploy.digest import pieces
from nvlm_deploy.progress import Progress

CHECK_DISK = "check the disk"

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class ReadBack(Generic[Name]):
    """CRC-32 of each part, SHA-256 of all of it."""

    checksums: Mapping[Name, int]
    sha256: str

    def differing(self, expected: Mapping[Name, int]) -> list[Name]:
        """The parts whose checksum is another one, or that are not there."""
        return [name for name, checksum in expected.items() if self.checksums.get(name) != checksum]


class WrittenAndReadBack:
    """Progress of bytes written and bytes read back, as one work of twice the size; from any thread."""

    def __init__(self, what: str, size_bytes: int, on_progress: Progress) -> None:
        self.what, self.done, self.total = what, 0, 2 * size_bytes
        self.on_progress, self._lock = on_progress, threading.Lock()

    def add(self, size_bytes: int) -> None:
        with self._lock:
            self.done += size_bytes
            self.on_progress(self.what, self.done, self.total)


def read_back(
    descriptor: int, parts: Mapping[Name, range], on_bytes: Callable[[int], None] | None = None
) -> ReadBack[Name]:
    """Read an open file once, whatever is between its parts too; each part by its range of bytes, none within another.

    `on_bytes` hears of every piece of a part. A part that the file is too short for has the checksum of what is there.
    """
    digest, checksums = hashlib.sha256(), dict.fromkeys(parts, 0)
    for name, places in _in_order(parts, os.fstat(descriptor).st_size):
        for piece in pieces(descriptor, places):
            digest.update(piece)
            if name is not None:
                checksums[name] = zlib.crc32(piece, checksums[name])
            if name is not None and on_bytes is not None:
                on_bytes(len(piece))
    return ReadBack(checksums, digest.hexdigest())


def checksum(descriptor: int, part: range) -> int:
    """CRC-32 of some bytes of an open file."""
    found = 0
    for piece in pieces(descriptor, part):
        found = zlib.crc32(piece, found)
    return found


def settle(descriptor: int) -> None:
    """To the disk, and out of the page cache: reading back should read the disk."""
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _in_order(parts: Mapping[Name, range], size_bytes: int) -> Iterator[tuple[Name | None, range]]:
    """Parts and, without a name, what is between them, up to the end of the file."""
    position = 0
    for name, part in sorted(parts.items(), key=lambda item: (item[1].start, item[1].stop)):
        yield None, range(position, part.start)
        yield name, part
        position = part.stop
    yield None, range(position, size_bytes)
