"""What the host has for a server and a build: its Python, its C library, its disks."""

from __future__ import annotations

import errno
import os
import platform
import re
import shutil
import sys
from importlib import metadata
from pathlib import Path


def python_version() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def glibc_version() -> tuple[int, int] | None:
    """None where the C library is another, as musl."""
    name, version = platform.libc_ver()
    found = re.match(r"([0-9]+)\.([0-9]+)", version)
    return (int(found[1]), int(found[2])) if name == "glibc" and found else None


def glibc_wanted_by(distribution: str) -> tuple[int, int] | None:
    """The least glibc that an installed wheel is built for, by its tag manylinux_X_Y; None where it does not say."""
    try:
        tags = metadata.distribution(distribution).read_text("WHEEL") or ""
    except metadata.PackageNotFoundError:
        return None
    found = [(int(major), int(minor)) for major, minor in re.findall(r"manylinux_([0-9]+)_([0-9]+)_", tags)]
    return min(found, default=None)


def free_bytes(folder: Path) -> int:
    """Of the file system that holds a folder, which need not exist yet."""
    return shutil.disk_usage(_existing(folder)).free


def require_writable(folder: Path) -> None:
    """Raises OSError where nothing can be put into a folder, or it cannot be made. Writes nothing."""
    existing = _existing(folder)
    if not existing.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(existing))
    if os.statvfs(existing).f_flag & os.ST_RDONLY:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(existing))
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(existing))


def _existing(folder: Path) -> Path:
    """Itself, or the nearest that is there above it."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
