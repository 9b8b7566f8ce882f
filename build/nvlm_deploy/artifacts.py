"""Artifacts: built things with a manifest of digests and provenance; written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from nvlm_deploy.digest import sha256_of_files
from nvlm_deploy.errors import MachineError, NvlmError
from nvlm_deploy.manifest import EVIDENCE_LEVELS, MANIFEST_NAME, Manifest, read_manifest

SIGNATURE_NAME = "manifest.json.sig"
# by what it holds a run goes on with the files of a killed one; no part of the finished folder
JOURNAL_NAME = ".journal"
# says what an unfinished folder is made of; no part of the finished one either
BEGUN_NOTE_NAME = ".begun.json"
_PARTIAL = ".partial-"
_REPLACED = "old-"
_BEGUN = "begun-"
_IDENTITY_DIGITS = 16
_CACHE = "__pycache__"
# what stands in a manifest for an empty folder: SHA-256 of no bytes
EMPTY = hashlib.sha256().hexdigest()
DigestsOf = Callable[[Iterable[Path]], Mapping[Path, str]]


@dataclass(frozen=True)
class Artifact:
    """A finished folder and its manifest."""

    folder: Path
    manifest: Manifest


def digests(folder: Path, digests_of: DigestsOf = sha256_of_files) -> dict[str, str]:
    """SHA-256 of each of an artifact's files (`files_of`), by relative path. Raises NvlmError for what is no file."""
    files = files_of(folder)
    for path in files.values():
        if not path.is_file() and not _is_folder(path):
            raise NvlmError(f"{path} is neither a file nor a folder", hint="remove it")
    return _digests_by_name(files, digests_of)


def _digests_by_name(files: Mapping[str, Path], digests_of: DigestsOf) -> dict[str, str]:
    by_path = digests_of([path for path in files.values() if path.is_file()])
    return {name: by_path.get(path, EMPTY) for name, path in files.items()}


def files_of(folder: Path) -> dict[str, Path]:
    """Each file below a folder, by relative path, but its manifest and signature.

    An empty folder is one too, its name ends with a slash: Triton loads the highest version it sees. So is a link,
    whatever is behind it, and a pipe. Left out is what Python writes beside a module it imports, as Triton's stubs do.
    """
    kept = [path for path in sorted(folder.rglob("*")) if not _goes_without_saying(path, folder)]
    return {path.relative_to(folder).as_posix() + "/" * _is_folder(path): path for path in kept}


def _goes_without_saying(path: Path, folder: Path) -> bool:
    """Python's caches, which come and go; the manifest and its signature; a folder that something is in."""
    if _is_folder(path):
        return path.name == _CACHE or any(path.iterdir())
    own = path in (folder / MANIFEST_NAME, folder / SIGNATURE_NAME)
    return _is_regular(path) and (own or (path.parent.name == _CACHE and path.suffix == ".pyc"))


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _is_regular(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def tool_versions(distributions: Sequence[str]) -> dict[str, str]:
    """Installed versions of the named distributions, `absent` where there is none."""
    versions = {}
    for name in ("nvlm-deploy", *distributions):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "absent"
    return versions


def verify(folder: Path, digests_of: DigestsOf = sha256_of_files) -> Artifact:
    """The artifact, if every file is byte for byte what its manifest says. Raises NvlmError naming what differs."""
    manifest = read_manifest(folder)
    found = changes(folder, manifest, digests_of)
    if found:
        raise NvlmError(f"{folder}: {found[0]}", hint="build the artifact again with --force, or fetch it again")
    return Artifact(folder, manifest)


def changes(folder: Path, manifest: Manifest, digests_of: DigestsOf = sha256_of_files) -> list[str]:
    """What a folder holds otherwise than its manifest says, a sentence for each way: missing, changed, added."""
    files = files_of(folder)
    both = files.keys() & manifest.outputs.keys()
    # a link may lead elsewhere tomorrow; what cannot be read is not what was written
    readable = {name: files[name] for name in both if _is_regular(files[name]) or _is_folder(files[name])}
    found = _digests_by_name(readable, digests_of)
    ways = {
        "missing": manifest.outputs.keys() - files.keys(),
        "changed": {name for name in both if found.get(name) != manifest.outputs[name]},
        "not in the manifest": files.keys() - manifest.outputs.keys(),
    }
    return [f"{some(sorted(names))} {way}" for way, names in ways.items() if names]


def some(names: Sequence[str], most: int = 5) -> str:
    """The first few, and how many there are beside; what a terminal would not show as it is, escaped."""
    shown = [name if name.isprintable() else ascii(name) for name in names[:most]]
    return ", ".join(shown) + (f" and {len(names) - most} more" if len(names) > most else "")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write it sealed."""
    if manifest.evidence not in EVIDENCE_LEVELS:
        raise ValueError(f"no evidence level {manifest.evidence!r}")
    write_text(folder / MANIFEST_NAME, manifest.sealed.text)


@contextlib.contextmanager
def replace_folder(folder: Path, *, kept: Path | None = None) -> Iterator[Path]:
    """A fresh folder beside `folder` to fill, swapped into its place at the end; on any failure nothing changes.

    What was at `folder` moves to `kept`; without `kept` it is removed. Leftovers of killed runs are cleared first.
    Raises MachineError when the disk is full.
    """
    temporary = _partial(folder)
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        clear_partial(folder)
        try:
            temporary.mkdir()
            yield temporary
            _swap(temporary, folder, kept)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def resumable_folder(folder: Path, identity: str, *, kept: Path | None = None) -> Iterator[Path]:
    """As `replace_folder`, but what a killed run, or one that ran out of disk, wrote is kept for the next run.

    The folder to fill then holds files already. Only a run of the same `identity` (hex digits) goes on with them. A run
    of another identity has a folder of its own and leaves this one alone. After wrong input a run begins anew.
    """
    begun = begun_folder(folder, identity)
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        clear_partial(folder)
        begun.mkdir(exist_ok=True)
        for half_written in [path for path in begun.rglob(f"{_PARTIAL}*") if path.is_file()]:
            half_written.unlink()
        try:
            yield begun
        except NvlmError as problem:
            if not isinstance(problem, MachineError):
                shutil.rmtree(begun, ignore_errors=True)
            raise
        for name in (JOURNAL_NAME, BEGUN_NOTE_NAME):
            (begun / name).unlink(missing_ok=True)
        _swap(begun, folder, kept)


def begun_folder(folder: Path, identity: str) -> Path:
    """Return where a run of one identity writes until it is finished."""
    return folder.with_name(f"{_PARTIAL}{_BEGUN}{identity[:_IDENTITY_DIGITS]}-{folder.name}")


def begun_below(parent: Path) -> list[tuple[str, Path]]:
    """Return what runs left unfinished in a folder, each with the name that it would have got."""
    name = re.compile(f"{re.escape(_PARTIAL)}{_BEGUN}[0-9a-f]{{{_IDENTITY_DIGITS}}}-(.+)")
    found = [(name.fullmatch(path.name), path) for path in sorted(parent.glob(f"{_PARTIAL}{_BEGUN}*"))]
    return [(match[1], path) for match, path in found if match is not None and path.is_dir()]


def remove_folder(folder: Path) -> None:
    """Remove a finished folder. A kill leaves nothing that looks finished: the folder gets another name first."""
    doomed = _partial(folder)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _swap(finished: Path, folder: Path, kept: Path | None) -> None:
    if kept is None:
        old = _partial(folder, _REPLACED)
    else:
        old = kept
        old.parent.mkdir(exist_ok=True)
    if folder.exists():
        folder.rename(old)
    finished.rename(folder)
    if kept is None:
        shutil.rmtree(old, ignore_errors=True)


def clear_partial(folder: Path) -> None:
    """Remove what killed runs left beside `folder`; a swap cut in the middle is put back.

    What a `resumable_folder` left stays, whatever its identity: hours of work may be in it.
    """
    # digits before the name, or `cpu` would claim the leftovers of `cpu-bf16`; a swap inside a swap repeats the prefix
    name = re.escape(folder.name)
    ours = re.compile(f"({re.escape(_PARTIAL)}({_REPLACED})?[0-9]+-)+{name}")
    replaced = re.compile(f"{re.escape(_PARTIAL)}{_REPLACED}[0-9]+-{name}")
    for leftover in [path for path in folder.parent.glob(f"{_PARTIAL}*") if ours.fullmatch(path.name)]:
        if replaced.fullmatch(leftover.name) and not folder.exists():
            leftover.rename(folder)
        else:
            shutil.rmtree(leftover, ignore_errors=True)


def _partial(path: Path, kind: str = "") -> Path:
    """The name beside `path` for what this process has not finished or (`old-`) is about to replace."""
    return path.with_name(f"{_PARTIAL}{kind}{os.getpid()}-{path.name}")


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write, renamed into its place at the end; on any failure removed."""
    temporary = _partial(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with replace_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Full disks surface as OSError from Python and as text from the Rust writer of safetensors."""
    try:
        yield
    except NvlmError:
        raise
    except Exception as problem:
        if getattr(problem, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(problem):
            raise MachineError(
                f"the disk is full: writing {target} failed; nothing was changed there",
                hint="free space (`df -h`), then run the same command again: finished steps are kept",
            ) from problem
        raise
