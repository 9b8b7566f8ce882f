"""Safetensors files written a few rows at a time, in any order and by several threads, and resumable.

A journal beside them names every tensor that is written whole, with the checksum of its bytes. After a kill the tensors
that the files really hold are kept and the others written again. The pass that reads a file back gives its SHA-256 too.
"""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from nvlm_deploy.checkpoint.journal import Journal, Key
from nvlm_deploy.checkpoint.read_back import CHECK_DISK, WrittenAndReadBack, checksum, read_back, settle
from nvlm_deploy.checkpoint.stream import Place, Tensors, header_of, places_of, require_dtype
from nvlm_deploy.digest import KNOWN_DIGESTS
from nvlm_deploy.errors import MachineError
from nvlm_deploy.progress import Progress, silent

if TYPE_CHECKING:
    import torch

_SETTLE_BYTES = 1 << 26
# what stat counts in, on every file system
_BLOCK_BYTES = 512
# each thread holds a few chunks of some MB
_MOST_THREADS = 8

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def tensor_files(
    folder: Path, headers: Mapping[str, Tensors], *, identity: str, on_progress: Progress = silent
) -> Iterator[TensorFiles]:
    """Files by name, each for the named (dtype, shape); all read back when the block ends.

    The folder may hold what a killed run of the same `identity` left. Disk space is taken at once. Raises MachineError
    when there is too little of it and when a file holds other bytes than were written.
    """
    journal = Journal(folder, identity)
    _require_space(folder, headers)
    with ExitStack() as opened:
        files = {
            name: opened.enter_context(_opened(folder / name, tensors, fresh=not journal.finished))
            for name, tensors in headers.items()
        }
        total = sum(place.size_bytes for file in files.values() for place in file.places.values())
        written = TensorFiles(files, journal, WrittenAndReadBack("decoder weights", total, on_progress))
        written.keep_intact()
        yield written
        sums = written.verify()
    for name, sha256 in sums.items():
        KNOWN_DIGESTS.remember(folder / name, sha256)


@dataclass(frozen=True)
class TensorFiles:
    """Open files with their headers written; every tensor of the headers is to be written."""

    files: Mapping[str, _File]
    journal: Journal
    report: WrittenAndReadBack
    written: set[Key] = field(default_factory=set)

    def is_finished(self, file: str, name: str) -> bool:
        """By this run or by the one that was killed."""
        return (file, name) in self.journal.finished

    @contextmanager
    def tensor(self, file: str, name: str) -> Iterator[OpenTensor]:
        """The tensor to fill, which must be whole when the block ends. Not for two threads at once."""
        if (file, name) in self.written:
            raise ValueError(f"{name} of {file} put twice")
        open_tensor = OpenTensor(name, self.files[file], self.report)
        yield open_tensor
        if open_tensor.filled != open_tensor.place.size_bytes:
            raise ValueError(f"{name}: {open_tensor.filled} bytes, its place has {open_tensor.place.size_bytes}")
        self.written.add((file, name))
        self.journal.add((file, name), open_tensor.checksum)

    def keep_intact(self) -> None:
        """Of what the journal names, only what the files hold."""
        places = {(file, name) for file in self.files for name in self.files[file].places}
        keys = [key for key in self.journal.finished if key in places]
        self.journal.keep(dict(zip(keys, in_threads(self._is_intact, keys), strict=True)))
        self.report.add(sum(self.files[file].places[name].size_bytes for file, name in self.journal.finished))

    def _is_intact(self, key: Key) -> bool:
        file, name = self.files[key[0]], key[1]
        return checksum(file.descriptor, file.parts[name]) == self.journal.finished[key]

    def verify(self) -> dict[str, str]:
        """SHA-256 of each file, read back from the disk rather than from the page cache."""
        missing = {(file, name) for file in self.files for name in self.files[file].places} - {*self.journal.finished}
        if missing:
            raise ValueError(f"{len(missing)} tensors never written, as {min(missing)}")
        names = sorted(self.files, key=lambda name: -self.files[name].size_bytes)
        return dict(zip(names, in_threads(self._verified, names), strict=True))

    def _verified(self, name: str) -> str:
        file = self.files[name]
        settle(file.descriptor)
        found = read_back(file.descriptor, file.parts, self.report.add)
        for tensor in found.differing(self.journal.of_file(name)):
            raise MachineError(f"{tensor} read back from {file.path} differs from what was written", hint=CHECK_DISK)
        return found.sha256


@dataclass
class OpenTensor:
    """One tensor of one file, filled in the order of its bytes."""

    name: str
    file: _File
    report: WrittenAndReadBack
    filled: int = 0
    checksum: int = 0

    @property
    def place(self) -> Place:
        return self.file.places[self.name]

    @property
    def missing_bytes(self) -> int:
        return self.place.size_bytes - self.filled

    def append(self, values: torch.Tensor) -> None:
        """The next values, of the tensor's own type."""
        import torch

        require_dtype(self.name, self.place, values)
        self.append_bytes(values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def append_bytes(self, data: bytes | memoryview) -> None:
        if len(data) > self.missing_bytes:
            raise ValueError(f"{self.name}: {self.filled + len(data)} bytes, its place has {self.place.size_bytes}")
        self.file.write(data, self.place.begin + self.filled)
        self.checksum = zlib.crc32(data, self.checksum)
        self.filled += len(data)
        self.report.add(len(data))


def in_threads(work: Callable[[Item], Result], items: Collection[Item]) -> list[Result]:
    """work(item) of all items, in their order; the first failure ends it. A thread for each core, to a few."""
    threads = max(1, min(_MOST_THREADS, len(os.sched_getaffinity(0)), len(items)))
    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result() for future in futures]


@dataclass
class _File:
    path: Path
    descriptor: int
    data_start: int
    places: Mapping[str, Place]
    unsettled_bytes: int = 0

    def write(self, data: bytes | memoryview, begin: int) -> None:
        """All of it: one call writes 2 GiB at most, and less when the disk is nearly full.

        Goes on to the disk soon: a page cache full of what nobody reads again was seen to take five times the
        processor time that the writing takes.
        """
        rest = memoryview(data)
        while rest:
            count = os.pwrite(self.descriptor, rest, self.data_start + begin)
            rest, begin = rest[count:], begin + count
        self.unsettled_bytes += len(data)
        if self.unsettled_bytes >= _SETTLE_BYTES:
            self.unsettled_bytes = 0
            settle(self.descriptor)

    @property
    def size_bytes(self) -> int:
        return os.fstat(self.descriptor).st_size

    @cached_property
    def parts(self) -> dict[str, range]:
        """Where each tensor lies."""
        begins = {name: self.data_start + place.begin for name, place in self.places.items()}
        return {name: range(begin, begin + self.places[name].size_bytes) for name, begin in begins.items()}


@contextmanager
def _opened(path: Path, tensors: Tensors, *, fresh: bool) -> Iterator[_File]:
    places = places_of(tensors)
    header = header_of(places)
    with path.open("w+b" if fresh or not path.exists() else "r+b") as file:
        size = len(header) + sum(place.size_bytes for place in places.values())
        _allocate(file.fileno(), size)
        os.pwrite(file.fileno(), header, 0)
        yield _File(path, file.fileno(), len(header), places)


def _require_space(folder: Path, headers: Mapping[str, Tensors]) -> None:
    """Before any file is made: half of them would take the space and be of no use."""
    needed = sum(place.size_bytes for tensors in headers.values() for place in places_of(tensors).values())
    present = sum((folder / name).stat().st_blocks * _BLOCK_BYTES for name in headers if (folder / name).exists())
    free = shutil.disk_usage(folder).free
    if needed > present + free:
        raise MachineError(
            f"the disk is full: {folder} needs {(needed - present) / 1e6:,.1f} MB more, {free / 1e6:,.1f} MB are free",
            hint="free space (`df -h`), then run the same command again: it goes on where it was",
        )


def _allocate(descriptor: int, size: int) -> None:
    """A disk that is too small should be found out before the first byte, and not be left full."""
    before = os.fstat(descriptor).st_size
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError:
        os.ftruncate(descriptor, before)
        raise
    os.ftruncate(descriptor, size)
