"""The lock of a workspace: one build at a time, and none while artifacts are removed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from nvlm_deploy.errors import MachineError


@contextlib.contextmanager
def build_lock(lock: Path) -> Iterator[None]:
    """Hold a workspace for a build, or for removing what builds made. Raises MachineError while another does."""
    with _opened(lock) as file, _exclusive(file):
        yield


def _opened(lock: Path) -> TextIO:
    """The first file of a build. Raises MachineError where nothing can be written at all."""
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        return lock.open("a+")
    except OSError as problem:
        if problem.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise MachineError(
            f"{lock.parent} cannot be written to: {problem.strerror}",
            hint="choose another: --workspace FOLDER",
        ) from problem


@contextlib.contextmanager
def _exclusive(lock: TextIO) -> Iterator[None]:
    """One build at a time per workspace; the kernel releases the lock of a killed build."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise MachineError(
            f"another build is running in {Path(lock.name).parent}", hint="wait for it, or choose another --workspace"
        ) from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    yield
