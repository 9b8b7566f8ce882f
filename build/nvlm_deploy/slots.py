"""Slots: one finished folder for each content that was built for a place. The current one lies at the place itself.

    engines/<profile>/decoder                      the current one
    engines/<profile>/slots/decoder-0123456789ab   another one, by the first digits of its key (inputs and choices)
    engines/<profile>/.partial-begun-...-decoder   what an unfinished run left, by its key too

The rule: a finished result that took more than copying is never overwritten by one of other inputs or choices. It moves
to its slot, by a rename, and comes back when it is asked for again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from nvlm_deploy.digest import sha256_of
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.manifest import MANIFEST_NAME, read_manifest

SLOTS_NAME = "slots"
KEY_DIGITS = 12


def key_of(folder: Path) -> str | None:
    """Return the key of a finished artifact; None where there is none, or its manifest cannot be trusted."""
    try:
        return read_manifest(folder).key
    except (NvlmError, OSError):
        return None


def is_slot(folder: Path) -> bool:
    """Return whether an artifact has been set aside, so that another one is current."""
    return folder.parent.name == SLOTS_NAME


def slots_of(place: Path) -> list[Path]:
    """Return the finished folders that were set aside from a place."""
    return [slot for name, slot in slots_below(place.parent) if name == place.name]


def slots_below(parent: Path) -> list[tuple[str, Path]]:
    """Return all that was set aside in a folder, each with the name of the place that it was set aside from."""
    name = re.compile(f"([^.].*?)-[0-9a-f]{{{KEY_DIGITS}}}(-[0-9]{{1,6}})?")
    below = parent / SLOTS_NAME
    found = sorted(below.iterdir()) if below.is_dir() else []
    named = [(name.fullmatch(path.name), path) for path in found if (path / MANIFEST_NAME).is_file()]
    return [(match[1], path) for match, path in named if match is not None]


def with_key(place: Path, key: str) -> Iterator[Path]:
    """Yield the finished folders of one content, at the place or set aside from it."""
    yield from (folder for folder in (place, *slots_of(place)) if key_of(folder) == key)


def slot_for(place: Path) -> Path | None:
    """Return where the artifact at a place goes when another takes its place; None where the place is empty.

    An artifact whose manifest is damaged is named by the manifest's bytes.
    """
    if not (place / MANIFEST_NAME).is_file():
        return None
    digits = (key_of(place) or sha256_of(place / MANIFEST_NAME))[:KEY_DIGITS]
    first = place.parent / SLOTS_NAME / f"{place.name}-{digits}"
    number, free = 1, first
    while free.exists():
        number, free = number + 1, first.with_name(f"{first.name}-{number}")
    return free


def bring_to_place(folder: Path, place: Path) -> None:
    """Make a finished folder the current one. Two renames: a kill between them leaves both artifacts whole."""
    if folder == place:
        return
    slot = slot_for(place)
    if slot is not None:
        place.rename(slot)
    elif place.is_dir():
        place.rmdir()  # an empty folder; anything else is not ours and was refused before
    folder.rename(place)
