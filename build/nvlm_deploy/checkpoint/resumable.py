"""Safetensors files written a few rows at a time, in any order and by several threads, and resumable.

A journal beside them names every tensor that is written whole, with the checksum of its bytes. After a kill the tensors
that the files really hold are kept and the others written again.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from nvlm_deploy.checkpoint.stream import Place, Tensors, header_of, places_of, require_dtype
from nvlm_deploy.errors import MachineError
from nvlm_deploy.progress import Progress, silent

if TYPE_CHECKING:
    import torch

JOURNAL_NAME = "journal"
# what `artifacts.replace_file` had not renamed when a run was killed
_HALF_WRITTEN = ".partial-*"
_READ_BYTES = 1 << 24
_SETTLE_BYTES = 1 << 26
# what stat counts in, on every file system
_BLOCK_BYTES = 512
# each thread holds a few chunks of some MB
_MOST_THREADS = 8

Item = TypeVar("Item")
Result = TypeVar("Result")
# (file, tensor)
Key = tuple[str, str]


@contextmanager
def tensor_files(
    folder: Path, headers: Mapping[str, Tensors], *, identity: str, on_progress: Progress = silent
) -> Iterator[TensorFiles]:
    """Files by name, each for the named (dtype, shape); all read back when the block ends.

    The folder may hold what a killed run of the same `identity` left. Disk space is taken at once. Raises MachineError
    when there is too little of it and when a file holds other bytes than were written.
    """
    _remove_half_written(folder)
    journal = _Journal(folder / JOURNAL_NAME, identity)
    _require_space(folder, headers)
    with ExitStack() as opened:
        files = {
            name: opened.enter_context(_opened(folder / name, tensors, fresh=not journal.finished))
            for name, tensors in headers.items()
        }
        written = TensorFiles(files, journal, _Report(on_progress, files.values()))
        written.keep_intact()
        yield written
        written.verify()
    journal.path.unlink()


@dataclass(frozen=True)
class TensorFiles:
    """Open files with their headers written; every tensor of the headers is to be written."""

    files: Mapping[str, _File]
    journal: _Journal
    report: _Report
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
        found = dict(self.journal.finished)
        for key, intact in zip(found, in_threads(self._is_intact, found), strict=True):
            if not intact:
                del self.journal.finished[key]

    def verify(self) -> None:
        """What this run wrote, read back from the disk rather than from the page cache."""
        missing = {(file, name) for file in self.files for name in self.files[file].places} - {*self.journal.finished}
        if missing:
            raise ValueError(f"{len(missing)} tensors never written, as {min(missing)}")
        for file in self.files.values():
            file.settle()
        in_threads(self._require_intact, sorted(self.written))

    def _is_intact(self, key: Key) -> bool:
        file, name = self.files[key[0]], key[1]
        intact = file.checksum(file.places[name]) == self.journal.finished[key]
        if intact:
            self.report.add(file.places[name].size_bytes)
        return intact

    def _require_intact(self, key: Key) -> None:
        if not self._is_intact(key):
            path = self.files[key[0]].path
            raise MachineError(f"{key[1]} read back from {path} differs from what was written", hint="check the disk")


@dataclass
class OpenTensor:
    """One tensor of one file, filled in the order of its bytes."""

    name: str
    file: _File
    report: _Report
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
            self.settle()

    def checksum(self, place: Place) -> int:
        buffer = memoryview(bytearray(min(_READ_BYTES, place.size_bytes)))
        checksum = done = 0
        while done < place.size_bytes:
            part = buffer[: place.size_bytes - done]
            count = os.preadv(self.descriptor, [part], self.data_start + place.begin + done)
            if not count:
                break
            os.posix_fadvise(self.descriptor, self.data_start + place.begin + done, count, os.POSIX_FADV_DONTNEED)
            checksum, done = zlib.crc32(part[:count], checksum), done + count
        return checksum

    def settle(self) -> None:
        """To the disk, and out of the page cache: reading back should read the disk."""
        self.unsettled_bytes = 0
        os.fsync(self.descriptor)
        os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def _opened(path: Path, tensors: Tensors, *, fresh: bool) -> Iterator[_File]:
    places = places_of(tensors)
    header = header_of(places)
    with path.open("w+b" if fresh or not path.exists() else "r+b") as file:
        size = len(header) + sum(place.size_bytes for place in places.values())
        _allocate(file.fileno(), size)
        os.pwrite(file.fileno(), header, 0)
        yield _File(path, file.fileno(), len(header), places)


def _remove_half_written(folder: Path) -> None:
    for path in folder.glob(_HALF_WRITTEN):
        path.unlink()


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


class _Journal:
    """Finished tensors and their checksums, a JSON line each; a line cut off by a kill does not count."""

    def __init__(self, path: Path, identity: str) -> None:
        self.path, self._lock = path, threading.Lock()
        first, *entries = _entries(path) or [[]]
        ours = first == ["identity", identity]
        self.finished: dict[Key, int] = {(file, name): checksum for file, name, checksum in entries} if ours else {}
        if not ours:
            path.write_text(json.dumps(["identity", identity]) + "\n", encoding="utf-8")

    def add(self, key: Key, checksum: int) -> None:
        with self._lock:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([*key, checksum]) + "\n")
            self.finished[key] = checksum


def _entries(path: Path) -> list[list[Any]]:
    entries: list[list[Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        # a run that went on after a kill or a full disk wrote behind the line that was cut off
        with suppress(ValueError):
            entries.append(json.loads(line))
    return entries


class _Report:
    """Bytes written and bytes read back, as one work of twice the size."""

    def __init__(self, on_progress: Progress, files: Iterable[_File]) -> None:
        self.on_progress, self.done, self._lock = on_progress, 0, threading.Lock()
        self.total = 2 * sum(place.size_bytes for file in files for place in file.places.values())

    def add(self, size_bytes: int) -> None:
        with self._lock:
            self.done += size_bytes
            self.on_progress("decoder weights", self.done, self.total)
