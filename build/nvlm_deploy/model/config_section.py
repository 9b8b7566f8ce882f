"""Values out of one section of config.json; what is missing or of another kind is named with its key."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nvlm_deploy.errors import NvlmError

# where a reader names no bound of its own: what still fits a 32-bit index
MOST_OF_ANYTHING = 2**31 - 1
LARGEST_FLOAT = sys.float_info.max
_MOST_SHOWN = 40


@dataclass(frozen=True)
class ConfigSection:
    """One JSON object and how to call it in messages. Every reader raises NvlmError for a value of the wrong kind."""

    values: Mapping[str, Any]
    place: str = "config.json"

    def section(self, key: str) -> ConfigSection:
        """The object below a key."""
        values = self.values.get(key)
        if not isinstance(values, Mapping):
            raise NvlmError(f"{self.place} has no section {key!r}", hint="fetch config.json of the checkpoint again")
        return ConfigSection(values, key if self.place == "config.json" else f"{self.place}.{key}")

    def has(self, key: str) -> bool:
        """Whether a key is there with a value other than null, false, zero or empty."""
        return bool(self.values.get(key))

    def is_null(self, key: str) -> bool:
        """Whether a key is there and says nothing."""
        return key in self.values and self.values[key] is None

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above zero; token ids may be zero."""
        value = self.values.get(key, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST_FLOAT
        if not is_number or (value <= 0 and not key.endswith("_id")):
            found = _shown(value) if key in self.values else "missing"
            raise NvlmError(f"{self.place}.{key} is {found}, expected a positive number")
        return float(value) if isinstance(value, float) else int(value)

    def integer(self, key: str, default: int | None = None, *, most: int = MOST_OF_ANYTHING) -> int:
        """A whole number above zero and not above `most`; token ids may be zero."""
        value = self.number(key, default)
        if value != int(value):
            raise NvlmError(f"{self.place}.{key} is {value}, expected a whole number")
        if value > most:
            raise NvlmError(
                f"{self.place}.{key} is {_shown(value)}, no such model has more than {most:,}",
                hint="fetch config.json of the checkpoint again",
            )
        return int(value)

    def flag(self, key: str, default: bool) -> bool:
        """true or false, and not a string that says so."""
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise NvlmError(f"{self.place}.{key} is {value!r}, expected true or false")
        return value

    def require(self, key: str, only: object, reason: str) -> None:
        """A key that, if it is there, must have this one value."""
        value = self.values.get(key, only)
        if value != only:
            raise NvlmError(f"{self.place}: {key} is {value!r}; only {only!r} is supported: {reason}")


def _shown(value: object) -> str:
    """A value as it is written, of a long one its beginning."""
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN - 3]}..."
