"""The config.json that trtllm-build writes beside its engines, compared field by field with what was asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvlm_deploy.checkpoint.reader import read_json
from nvlm_deploy.errors import MachineError
from nvlm_deploy.llm.engine_arguments import Argument

CONFIG_NAME = "config.json"
_NAMED = 6


@dataclass(frozen=True)
class Difference:
    """One field, dotted, with both values; `found` is ABSENT where there is none."""

    field: str
    found: object
    expected: object

    def __str__(self) -> str:
        return f"{self.field} is {self.found!r}, asked was {self.expected!r}"


class _Absent:
    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent()


def expected_config(
    version: str, checkpoint_config: Mapping[str, Any], arguments: Sequence[Argument]
) -> dict[str, Any]:
    """What an engine's config.json must say, as far as we asked for it."""
    build_config: dict[str, Any] = {}
    for argument in arguments:
        *sections, name = argument.field.split(".")
        place = build_config
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = argument.expected
    return {"version": version, "pretrained_config": dict(checkpoint_config), "build_config": build_config}


def differences(expected: Mapping[str, Any], found: Mapping[str, Any], place: str = "") -> Iterator[Difference]:
    """Fields of `expected` that `found` lacks or has otherwise; what only `found` has is its own business."""
    for key, value in expected.items():
        field, other = f"{place}{key}", found.get(key, ABSENT)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            yield from differences(value, other, f"{field}.")
        elif not _equal(key, value, other):
            yield Difference(field, other, value)


def _equal(key: str, expected: object, found: object) -> bool:
    if key == "kv_cache_type" and isinstance(found, str) and isinstance(expected, str):
        return found.upper() == expected.upper()  # an enum's name in one release, its value in another
    # True == 1 in Python, but a switch that became a number is another thing
    return isinstance(expected, bool) == isinstance(found, bool) and expected == found


def require_as_asked(folder: Path, expected: Mapping[str, Any]) -> Mapping[str, Any]:
    """The engine's config.json. Raises MachineError naming every field that is not what was asked."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise MachineError(f"trtllm-build ended well but wrote no {path}", hint="read rank0.log beside it")
    config: Mapping[str, Any] = read_json(path)
    found = list(differences(expected, config))
    if found:
        more = f"; and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        raise MachineError(
            f"trtllm-build did not build what was asked, by {path}: {'; '.join(map(str, found[:_NAMED]))}{more}",
            hint="it overrides what it cannot do, and says so in its log; `nvlm doctor --container` looks at the rest",
        )
    return config
