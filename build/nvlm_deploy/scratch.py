"""Scratch folders in the temporary directory that do not outlive their owner, however it died.

A folder `nvlm-PURPOSE-RANDOM` holds a file `owner`, which its process keeps locked. The kernel releases the lock when
the process ends, also on SIGKILL. So a folder of this user whose `owner` can be locked is abandoned, and whoever makes
the next scratch folder removes it. Process ids decide nothing: they are used again, and containers count their own.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from nvlm_deploy.errors import MachineError

log = logging.getLogger(__name__)

_PREFIX = "nvlm-"
OWNER = "owner"
_CONTENT = "content"
_FULL = (errno.ENOSPC, errno.EDQUOT)
# a disk on which a write failed for want of room has less than this left
_NOTHING_BYTES = 2**20
ANOTHER_PLACE = "`export TMPDIR=FOLDER` takes another place"


@contextlib.contextmanager
def scratch_folder(purpose: str) -> Iterator[Path]:
    """An empty folder, removed at the end. Those that killed processes left are removed first.

    Raises MachineError where the temporary directory cannot be written to, or is full: also when a write into the
    folder fails for want of room.
    """
    remove_abandoned()
    outer = _made(purpose)
    try:
        with _errors_of(outer), _owned(outer):
            content = outer / _CONTENT
            content.mkdir()
            yield content
    finally:
        shutil.rmtree(outer, ignore_errors=True)


def remove_abandoned() -> None:
    """Remove this user's scratch folders whose owner has ended; all others stay."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError), _lock_of_abandoned(folder):
            log.info("%s was left by a process that has ended: removed", folder)
            shutil.rmtree(folder, ignore_errors=True)


def _made(purpose: str) -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{purpose}-"))
    except OSError as problem:
        raise MachineError(
            f"no temporary folder can be made: {problem.strerror}", hint=f"free space there; or {ANOTHER_PLACE}"
        ) from problem


@contextlib.contextmanager
def _owned(folder: Path) -> Iterator[None]:
    """Hold the lock. The file gets its name when it is locked: nobody finds it unlocked while its owner lives.

    Where the file system knows no locks there is no such file, and the folder never counts as abandoned.
    """
    unlocked = folder / f"{OWNER}.new"
    with unlocked.open("wb") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            unlocked.rename(folder / OWNER)
        yield


@contextlib.contextmanager
def _lock_of_abandoned(folder: Path) -> Iterator[None]:
    """Raises OSError unless the folder is this user's and its owner has ended."""
    if folder.lstat().st_uid != os.getuid():
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(folder))
    directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        file = os.open(OWNER, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=directory)
    finally:
        os.close(directory)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(file)


@contextlib.contextmanager
def _errors_of(folder: Path) -> Iterator[None]:
    """A full temporary directory is named as such: where a copy fails, the error's first file is the source."""
    try:
        yield
    except MachineError:
        raise
    except Exception as problem:
        if _is_full_disk_of(folder, problem):
            place = tempfile.gettempdir()
            raise MachineError(
                f"the temporary directory {place} is full", hint=f"free space (`df -h {place}`); or {ANOTHER_PLACE}"
            ) from problem
        raise


def _is_full_disk_of(folder: Path, problem: Exception) -> bool:
    """The library of safetensors, in Rust, says it in words; an error without a file's name is judged by the room."""
    if getattr(problem, "errno", None) not in _FULL and "No space left" not in str(problem):
        return False
    names = [getattr(problem, name, None) for name in ("filename2", "filename")]
    target = next((str(name) for name in names if name), None)
    if target is not None:
        return target.startswith(f"{folder}{os.sep}")
    return shutil.disk_usage(folder).free < _NOTHING_BYTES
