"""What a workspace stores: current artifacts, those set aside in slots, unfinished ones; and how to remove the latter.

A current artifact is never removed, nor, unless it is named, one that a current artifact was made of.
"""

from __future__ import annotations

import datetime
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from nvlm_deploy.artifacts import BEGUN_NOTE_NAME, begun_below, remove_folder
from nvlm_deploy.build_lock import build_lock
from nvlm_deploy.errors import NvlmError, unknown_name
from nvlm_deploy.manifest import MANIFEST_NAME, Manifest, read_manifest, sha256_of_json
from nvlm_deploy.pipeline import differences
from nvlm_deploy.slots import KEY_DIGITS, SLOTS_NAME, slots_below
from nvlm_deploy.verification import CALIBRATION_INPUT

_ROOTS = ("engines", "triton_repo")
_SHA256_DIGITS = 64


class Status(StrEnum):
    """Where an artifact stands."""

    CURRENT = "current"
    SET_ASIDE = "set aside"
    UNFINISHED = "unfinished"


@dataclass(frozen=True)
class Stored:
    """One artifact of a workspace. `name` is its path below the workspace.

    `freed_bytes` leaves out files that a repository links to: they stay on the disk. `differs` says in what a slot is
    another than the current artifact, `used_by` which current artifacts were made of it.
    """

    name: str
    folder: Path
    status: Status
    kind: str
    size_bytes: int
    freed_bytes: int
    age_s: float
    made_of: tuple[str, ...]
    differs: tuple[str, ...] = ()
    used_by: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "folder"} | {"status": str(self.status)}


@dataclass(frozen=True)
class Selection:
    """What to remove: the named ones; without names all that are set aside, of some age, unfinished ones if asked."""

    names: Sequence[str] = ()
    older_than_days: float = 0.0
    unfinished: bool = False

    def of(self, stored: Sequence[Stored]) -> list[Stored]:
        """Raises NvlmError for a name that is not there, or is current."""
        return [_named(name, stored) for name in dict.fromkeys(self.names)] or [
            one for one in stored if self._is_meant(one)
        ]

    def _is_meant(self, one: Stored) -> bool:
        wanted = {Status.SET_ASIDE, Status.UNFINISHED} if self.unfinished else {Status.SET_ASIDE}
        return one.status in wanted and not one.used_by and one.age_s >= self.older_than_days * 86400


def _named(name: str, stored: Sequence[Stored]) -> Stored:
    plain = name.strip().rstrip("/")
    one = next((one for one in stored if plain in (one.name, str(one.folder), str(one.folder.absolute()))), None)
    removable = [one.name for one in stored if one.status is not Status.CURRENT]
    if one is None:
        raise unknown_name("stored artifact", name, removable or ["none that could be removed"])
    if one.status is Status.CURRENT:
        raise NvlmError(
            f"{one.name} is current: it is never pruned",
            hint=f"those that can be: {', '.join(removable) or 'none'}",
        )
    return one


def stored_artifacts(workspace: Path) -> list[Stored]:
    """Return all artifacts of a workspace, sorted by name. Raises NvlmError where there is no workspace."""
    if not any((workspace / root).is_dir() for root in _ROOTS):
        raise NvlmError(
            f"{workspace} is no workspace: it has no engines/ and no triton_repo/",
            hint="name the folder that `nvlm build --workspace` got",
        )
    places = [place for parent in _parents(workspace) for place in sorted(parent.iterdir()) if _is_place(place)]
    users = {place.relative_to(workspace).as_posix(): set(_manifest(place).inputs.values()) for place in places}
    found = [_finished(workspace, place, place, users) for place in places]
    for parent in _parents(workspace):
        found += [_finished(workspace, slot, parent / name, users) for name, slot in slots_below(parent)]
        found += [_unfinished(workspace, kind, path) for kind, path in begun_below(parent)]
    return sorted(found, key=lambda one: one.name)


def prune(workspace: Path, selection: Selection) -> list[Stored]:
    """Remove what is selected and return it. Raises MachineError while a build runs, NvlmError as `Selection.of`."""
    stored_artifacts(workspace)  # nothing is made, not even a lock, where no workspace is
    with build_lock(workspace / "engines" / ".lock"):
        removed = selection.of(stored_artifacts(workspace))
        for one in removed:
            remove_folder(one.folder)
        for parent in _parents(workspace):
            _clear(parent / SLOTS_NAME)
    return removed


def _clear(slots: Path) -> None:
    """Remove what a killed removal left, and the folder when nothing is left in it."""
    if not slots.is_dir():
        return
    for leftover in slots.glob(".partial-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    if not any(slots.iterdir()):
        slots.rmdir()


def _parents(workspace: Path) -> list[Path]:
    """Return the folders that artifacts lie in: one for each profile, the calibrations, the repositories."""
    engines, repositories = workspace / "engines", workspace / "triton_repo"
    found = sorted(path for path in engines.iterdir() if path.is_dir()) if engines.is_dir() else []
    return found + [repositories] * repositories.is_dir()


def _is_place(path: Path) -> bool:
    return not path.name.startswith(".") and (path / MANIFEST_NAME).is_file()


def _manifest(folder: Path) -> Manifest:
    """Return what an artifact says of itself; where that is damaged, nothing."""
    try:
        return read_manifest(folder)
    except NvlmError:
        return Manifest("damaged", "", {}, {}, {}, "not run", {}, created="")


def _finished(workspace: Path, folder: Path, place: Path, users: Mapping[str, set[str]]) -> Stored:
    made, is_current = _manifest(folder), folder == place
    content = sha256_of_json(dict(made.outputs))
    used_by = tuple(name for name, inputs in users.items() if made.key and content in inputs)
    size, freed = _sizes(folder)
    return Stored(
        folder.relative_to(workspace).as_posix(),
        folder,
        Status.CURRENT if is_current else Status.SET_ASIDE,
        made.kind,
        size,
        freed,
        _age_s(folder, made.created),
        tuple(_made_of(made.settings, made.inputs, [one.folder for one in made.calibration])),
        () if is_current or not place.is_dir() else tuple(_unlike(made, _manifest(place))),
        used_by,
    )


def _unlike(made: Manifest, current: Manifest) -> Iterator[str]:
    """Yield what differs; the files of another calibration list are one thing."""
    found = list(differences(made, current))
    files = [one for one in found if one.startswith(f"input {CALIBRATION_INPUT}")]
    if files:
        yield "another calibration list"
    yield from (one for one in found if one not in files)


def _unfinished(workspace: Path, kind: str, folder: Path) -> Stored:
    try:
        note = json.loads((folder / BEGUN_NOTE_NAME).read_text(encoding="utf-8"))
        made_of = tuple(_made_of(note["settings"], note["inputs"], note["lists"]))
        kind = note["kind"]
    except (OSError, ValueError, KeyError, TypeError):
        made_of = ("not said",)
    size, freed = _sizes(folder)
    newest = max((path.stat().st_mtime for path in folder.rglob("*")), default=folder.stat().st_mtime)
    age_s = max(0.0, datetime.datetime.now(datetime.UTC).timestamp() - newest)
    name = folder.relative_to(workspace).as_posix()
    return Stored(name, folder, Status.UNFINISHED, kind, size, freed, age_s, made_of)


def _sizes(folder: Path) -> tuple[int, int]:
    """Return the bytes of its files, and of those that nothing else links to."""
    states = [path.lstat() for path in folder.rglob("*") if path.is_file()]
    return sum(state.st_size for state in states), sum(state.st_size for state in states if state.st_nlink == 1)


def _age_s(folder: Path, created: str) -> float:
    now = datetime.datetime.now(datetime.UTC)
    try:
        then = datetime.datetime.fromisoformat(created)
    except ValueError:
        then = datetime.datetime.fromtimestamp(folder.stat().st_mtime, datetime.UTC)
    return max(0.0, (now - then).total_seconds())


def _made_of(settings: Mapping[str, Any], inputs: Mapping[str, str], lists: Sequence[str]) -> Iterator[str]:
    """Yield the calibration lists, the other inputs by a short digest, and the choices."""
    samples = {name: value for name, value in inputs.items() if name.startswith(CALIBRATION_INPUT)}
    others = {name: value for name, value in inputs.items() if name not in samples}
    for folder in lists:
        own = f" ({len(samples)} files, {sha256_of_json(samples)[:KEY_DIGITS]})" if samples else ""
        yield f"calibration list {folder}{own}"
    if others:
        names = ", ".join(sorted(others)[:2]) + (", ..." if len(others) > 2 else "")
        yield f"{names} ({sha256_of_json(others)[:KEY_DIGITS]})"
    yield from (f"{name} = {value}" for name, value in _flat(settings))


def _flat(settings: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for name, value in sorted(settings.items()):
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        else:
            text = str(value)
            yield f"{before}{name}", text[:KEY_DIGITS] if len(text) == _SHA256_DIGITS else text
