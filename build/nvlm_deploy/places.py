"""Is what a user named there, and of the right kind? Nothing there, another kind and a broken link are told apart."""

from __future__ import annotations

import stat
from pathlib import Path

from nvlm_deploy.errors import NvlmError

_KINDS = {stat.S_IFREG: "a file", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}


def require_folder(path: Path, what: str = "folder", *, hint: str | None = None) -> None:
    """Raises NvlmError unless the path is a folder; `hint` says how to get one where nothing is there."""
    _require(path, stat.S_IFDIR, f"no {what} {path}", hint)


def require_file(path: Path, what: str = "file", *, hint: str | None = None) -> None:
    """As `require_folder`, of a file."""
    _require(path, stat.S_IFREG, f"no {what} {path}", hint)


def _require(path: Path, wanted: int, missing: str, hint: str | None) -> None:
    try:
        found = stat.S_IFMT(path.stat().st_mode)
    except FileNotFoundError:
        if path.is_symlink():
            raise NvlmError(f"{path} is a link to {path.readlink()}, which does not exist") from None
        raise NvlmError(missing, hint=hint) from None
    except NotADirectoryError:
        file = next(parent for parent in path.parents if parent.exists())
        raise NvlmError(f"{file} is {_kind(file.stat().st_mode)}, not a folder") from None
    if found != wanted:
        raise NvlmError(f"{path} is {_kind(found)}, not {_KINDS[wanted]}")


def _kind(mode: int) -> str:
    return _KINDS.get(stat.S_IFMT(mode), "a device")
