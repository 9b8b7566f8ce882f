"""SHA-256 of files, several at a time: what `sha256sum` prints, so that nobody needs this tool to check it.

A tree hash would use all cores within one file, but every other tool would have to learn it. OpenSSL hashes 1.3 GB/s on
one core that has SHA instructions (every server since Zen and Ice Lake), and an artifact of size has several files.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

_READ_BYTES = 1 << 20
# asked of the disk while earlier bytes are hashed: a cold file took up to 1.5 times as long without
_AHEAD_BYTES = 1 << 22


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, streamed. OSError when it cannot be read to its end."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        for piece in pieces(file.fileno(), range(os.fstat(file.fileno()).st_size)):
            digest.update(piece)
    return digest.hexdigest()


def pieces(descriptor: int, places: range) -> Iterator[memoryview]:
    """The bytes there of an open file, each piece good until the next; fewer where the file ends."""
    buffer, position = memoryview(bytearray(min(_READ_BYTES, len(places)))), places.start
    while position < places.stop:
        with suppress(OSError):  # a file system that takes no advice
            os.posix_fadvise(descriptor, position + _READ_BYTES, _AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
        count = os.preadv(descriptor, [buffer[: places.stop - position]], position)
        if not count:
            return
        yield buffer[:count]
        position += count


def sha256_of_files(paths: Iterable[Path]) -> dict[Path, str]:
    """SHA-256 of each file, a thread for each core; the largest first, so that none is left over for the end."""
    by_size = sorted(set(paths), key=lambda path: path.stat().st_size, reverse=True)
    if not by_size:
        return {}
    with ThreadPoolExecutor(min(len(by_size), len(os.sched_getaffinity(0)))) as pool:
        return dict(zip(by_size, pool.map(sha256_of, by_size), strict=True))


# (device, inode, size, time of change) of a file -> its SHA-256
_State = tuple[int, int, int, int]


class KnownDigests:
    """Digests of files that stay as they are: one pass over each, whatever its name and however many links it has.

    A writer that has seen all bytes of a file go by may `remember` its digest, and nobody reads the file for it again.
    For builds; who verifies reads.
    """

    def __init__(self) -> None:
        self._known: dict[_State, str] = {}
        self._lock = threading.Lock()

    def remember(self, path: Path, sha256: str) -> None:
        """To be called when the last byte is written and the file closed."""
        with self._lock:
            self._known[_state_of(path)] = sha256

    def of(self, paths: Iterable[Path]) -> dict[Path, str]:
        """SHA-256 of each file, read only where it is not known."""
        states = {path: _state_of(path) for path in paths}
        unknown = {state: path for path, state in states.items() if state not in self._known}
        read = sha256_of_files(unknown.values())
        with self._lock:
            self._known |= {state: read[path] for state, path in unknown.items()}
            return {path: self._known[state] for path, state in states.items()}


def _state_of(path: Path) -> _State:
    state = path.stat()
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns


KNOWN_DIGESTS = KnownDigests()
