"""Artifacts: built things with a manifest of digests and provenance; written whole or not at all."""

from __future__ import annotations

import contextlib
import datetime
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from nvlm_deploy.digest import sha256_of as sha256_of  # what most callers want of that module
from nvlm_deploy.digest import sha256_of_files
from nvlm_deploy.errors import MachineError, NvlmError

MANIFEST_NAME = "manifest.json"
SIGNATURE_NAME = "manifest.json.sig"
EVIDENCE_LEVELS = ("measured", "contract-checked", "published", "derived", "not run")
LICENCE_NOTE = "derived from the named checkpoint; NVLM-D-72B weights are CC-BY-NC-4.0 (non-commercial)"
_PARTIAL = ".partial-"
_REPLACED = "old-"
_BEGUN = "begun-"
_IDENTITY_DIGITS = 16
DigestsOf = Callable[[Iterable[Path]], Mapping[Path, str]]


@dataclass(frozen=True)
class Manifest:
    """What an artifact is and where it came from.

    `outputs` and `inputs` map names to SHA-256; `key` is the digest of inputs and settings that decides "up to date".
    `profile` is all of it, `calibration` the lists behind the scales ({"folder", "files": {name: SHA-256}}),
    `fingerprints` what the engines are bound to, by the step that built them (fingerprint.py). `seal` is the digest of
    everything else here; manifests that were written before there were seals have none.
    """

    kind: str
    key: str
    inputs: Mapping[str, str]
    settings: Mapping[str, Any]
    outputs: Mapping[str, str]
    evidence: str
    tools: Mapping[str, str]
    created: str = field(default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
    licence: str = LICENCE_NOTE
    notes: Mapping[str, Any] = field(default_factory=dict)
    profile: Mapping[str, Any] | None = None
    calibration: Sequence[Mapping[str, Any]] = ()
    fingerprints: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    seal: str = ""

    @property
    def sealed(self) -> Manifest:
        """Itself with its seal."""
        return replace(self, seal=sha256_of_json(asdict(replace(self, seal=""))))

    @property
    def text(self) -> str:
        """As it stands in the file, byte for byte."""
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"


@dataclass(frozen=True)
class Artifact:
    """A finished folder and its manifest."""

    folder: Path
    manifest: Manifest


def sha256_of_json(value: object) -> str:
    """SHA-256 of a value by its canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def digests(folder: Path, digests_of: DigestsOf = sha256_of_files) -> dict[str, str]:
    """SHA-256 of each of an artifact's files (`files_of`), by relative path."""
    files = files_of(folder)
    by_path = digests_of(files.values())
    return {name: by_path[path] for name, path in files.items()}


def files_of(folder: Path) -> dict[str, Path]:
    """Each file below a folder, by relative path, but its manifest and signature.

    Left out is what Python writes beside a module it imports, as Triton's stubs do with every `model.py` they load. A
    link to a folder counts as a file: nobody looked at what is behind it.
    """
    found = sorted(path for path in folder.rglob("*") if path.is_file() or path.is_symlink())
    own = {folder / MANIFEST_NAME, folder / SIGNATURE_NAME}
    kept = [path for path in found if path not in own and path.parent.name != "__pycache__"]
    return {path.relative_to(folder).as_posix(): path for path in kept}


def tool_versions(distributions: Sequence[str]) -> dict[str, str]:
    """Installed versions of the named distributions, `absent` where there is none."""
    versions = {}
    for name in ("nvlm-deploy", *distributions):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "absent"
    return versions


def read_manifest(folder: Path) -> Manifest:
    """Raises NvlmError when a folder has no manifest, or one with a byte other than it was written with."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise NvlmError(f"{folder} has no {MANIFEST_NAME}: not a finished artifact", hint="build it again")
    hint = f"remove {folder} and build it again"
    try:
        text = path.read_bytes().decode("utf-8")
        manifest = Manifest(**json.loads(text))
    except (ValueError, TypeError) as problem:
        raise NvlmError(f"{path} is damaged: {problem}", hint=hint) from problem
    if manifest.seal and (manifest.text != text or manifest.sealed != manifest):
        raise NvlmError(f"{path} is damaged: it was changed after it was written", hint=hint)
    return manifest


def verify(folder: Path) -> Artifact:
    """The artifact, if every file is byte for byte what its manifest says. Raises NvlmError naming what differs."""
    manifest = read_manifest(folder)
    found = changes(folder, manifest)
    if found:
        raise NvlmError(f"{folder}: {found[0]}", hint="build the artifact again with --force, or fetch it again")
    return Artifact(folder, manifest)


def changes(folder: Path, manifest: Manifest, digests_of: DigestsOf = sha256_of_files) -> list[str]:
    """What a folder holds otherwise than its manifest says, a sentence for each way: missing, changed, added."""
    files = files_of(folder)
    listed = files.keys() & manifest.outputs.keys()
    # what cannot be read is not what was written
    regular = {name: files[name] for name in listed if files[name].is_file()}
    by_path = digests_of(regular.values())
    ways = {
        "missing": manifest.outputs.keys() - files.keys(),
        "changed": {name for name in listed if by_path.get(files[name]) != manifest.outputs[name]},
        "not in the manifest": files.keys() - manifest.outputs.keys(),
    }
    return [f"{some(sorted(names))} {way}" for way, names in ways.items() if names]


def some(names: Sequence[str], most: int = 5) -> str:
    """The first few, and how many there are beside."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write it sealed."""
    if manifest.evidence not in EVIDENCE_LEVELS:
        raise ValueError(f"no evidence level {manifest.evidence!r}")
    # sealed as it will be read: JSON knows neither tuples nor numbers as keys
    as_read = Manifest(**json.loads(json.dumps(asdict(manifest))))
    write_text(folder / MANIFEST_NAME, as_read.sealed.text)


@contextlib.contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """A fresh folder beside `folder` to fill, swapped into its place at the end; on any failure nothing changes.

    Leftovers of killed runs are cleared first. Raises MachineError when the disk is full.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    clear_partial(folder)
    temporary = _partial(folder)
    with _disk_errors(folder):
        try:
            temporary.mkdir()
            yield temporary
            _swap(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def resumable_folder(folder: Path, identity: str) -> Iterator[Path]:
    """As `replace_folder`, but what a killed run, or one that ran out of disk, wrote is kept for the next run.

    The folder to fill then holds files already. Only a run of the same `identity` (hex digits) goes on with them, any
    other begins anew, as does one after wrong input.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    clear_partial(folder, keep=identity)
    begun = folder.with_name(f"{_PARTIAL}{_BEGUN}{identity[:_IDENTITY_DIGITS]}-{folder.name}")
    with _disk_errors(folder):
        begun.mkdir(exist_ok=True)
        try:
            yield begun
        except NvlmError as problem:
            if not isinstance(problem, MachineError):
                shutil.rmtree(begun, ignore_errors=True)
            raise
        _swap(begun, folder)


def _swap(finished: Path, folder: Path) -> None:
    old = _partial(folder, _REPLACED)
    if folder.exists():
        folder.rename(old)
    finished.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def clear_partial(folder: Path, *, keep: str | None = None) -> None:
    """Remove what killed runs left beside `folder`; a swap cut in the middle is put back.

    What a `resumable_folder` of the identity `keep` left stays.
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
    kept = f"{_PARTIAL}{_BEGUN}{keep[:_IDENTITY_DIGITS] if keep else ''}-{folder.name}"
    begun = re.compile(f"{re.escape(_PARTIAL)}{_BEGUN}[0-9a-f]{{{_IDENTITY_DIGITS}}}-{name}")
    for leftover in [path for path in folder.parent.glob(f"{_PARTIAL}{_BEGUN}*") if begun.fullmatch(path.name)]:
        if leftover.name != kept:
            shutil.rmtree(leftover, ignore_errors=True)


def _partial(path: Path, kind: str = "") -> Path:
    """The name beside `path` for what this process has not finished or (`old-`) is about to replace."""
    return path.with_name(f"{_PARTIAL}{kind}{os.getpid()}-{path.name}")


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write, renamed into its place at the end; on any failure removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _partial(path)
    with _disk_errors(path):
        try:
            yield temporary
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with replace_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
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
