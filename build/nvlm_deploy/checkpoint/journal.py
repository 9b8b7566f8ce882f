"""The journal of a file being written: what is whole in it, with the checksum of its bytes.

It lies beside the files until their folder is finished (`artifacts.resumable_folder` removes it): a run that is killed
while the finished files are hashed, or while the folder is put in its place, is not begun anew.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from nvlm_deploy.artifacts import JOURNAL_NAME

# (file, part of it)
Key = tuple[str, str]


class Journal:
    """Finished parts and their checksums, a JSON line each; a line cut off by a kill does not count."""

    def __init__(self, folder: Path, identity: str) -> None:
        self.path, self._lock = folder / JOURNAL_NAME, threading.Lock()
        first, *entries = _entries(self.path) or [[]]
        ours = first == ["identity", identity]
        self.finished: dict[Key, int] = {(entry[0], entry[1]): entry[2] for entry in filter(_is_part, entries) if ours}
        if not ours:
            self.path.write_text(json.dumps(["identity", identity]) + "\n", encoding="utf-8")

    def add(self, key: Key, checksum: int) -> None:
        """From any thread."""
        with self._lock:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([*key, checksum]) + "\n")
            self.finished[key] = checksum

    def keep(self, intact: Mapping[Key, bool]) -> None:
        """Of what a killed run finished, only what is intact."""
        self.finished = {key: checksum for key, checksum in self.finished.items() if intact.get(key)}

    def of_file(self, name: str) -> dict[str, int]:
        """Checksums of the finished parts of one file."""
        return {part: checksum for (file, part), checksum in self.finished.items() if file == name}


def _is_part(entry: Any) -> bool:
    """Whether it is of a finished part; a disk may give back anything."""
    return isinstance(entry, list) and [type(value) for value in entry] == [str, str, int]


def _entries(path: Path) -> list[Any]:
    entries: list[Any] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        # a run that went on after a kill or a full disk wrote behind the line that was cut off
        with suppress(ValueError):
            entries.append(json.loads(line))
    return entries
