"""One key of one file of a checkpoint, and what becomes of its value. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from nvlm_deploy.errors import NvlmError

CONFIG, LLM, VISION = "config.json", "llm_config", "vision_config"
GENERATION = "generation_config.json"
TOKENIZER, TOKENIZER_MODEL = "tokenizer.json", "tokenizer.json model"
TOKENIZER_CONFIG = "tokenizer_config.json"
PREPROCESSOR = "preprocessor_config.json"
WEIGHTS = "safetensors"

_MOST_SHOWN = 60


class Treatment(StrEnum):
    """What becomes of a value that is worth a line."""

    HONOURED = "honoured"
    NEUTRALISED = "neutralised"
    ASSUMED = "assumed"
    REFUSED = "refused"


@dataclass(frozen=True)
class Documents:
    """The settings files of a checkpoint by the places that the table names; a file that is not there has no place."""

    places: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of_config(cls, config: Mapping[str, Any], others: Mapping[str, Mapping[str, Any]] | None = None) -> Documents:
        """config.json and its two sections, and the `others` by name."""
        sections = {LLM: config.get(LLM), VISION: config.get(VISION)}
        found = {name: section for name, section in sections.items() if isinstance(section, Mapping)}
        documents: dict[str, Mapping[str, Any]] = {CONFIG: config, **found, **(others or {})}
        model = documents.get(TOKENIZER, {}).get("model")
        return cls(documents | ({TOKENIZER_MODEL: model} if isinstance(model, Mapping) else {}))

    def value(self, place: str, key: str) -> Any:
        """The value of a key; None where the file or the key is missing."""
        return self.places.get(place, {}).get(key)


@dataclass(frozen=True)
class Finding:
    """One setting of a checkpoint of which there is something to say."""

    treatment: Treatment
    place: str
    key: str
    value: str
    effect: str
    hint: str | None = None

    @property
    def setting(self) -> str:
        """As `temperature = 0.7`, or `rope_theta is missing`."""
        return f"{self.key} = {self.value}" if self.value else f"{self.key} is missing"


@dataclass(frozen=True)
class Setting:
    """One key: with the values of `is_plain` nothing is said, of any other `effect`; of a missing key `absent`."""

    place: str
    key: str
    treatment: Treatment = Treatment.HONOURED
    is_plain: Callable[[Any], bool] = lambda _: True
    effect: str = ""
    absent: str = ""
    hint: str | None = None

    def finding(self, documents: Documents) -> Finding | None:
        """What is to be said of this key in these files; None when it is plain or its file is missing."""
        document = documents.places.get(self.place)
        if document is None:
            return None
        if self.key not in document:
            return Finding(Treatment.ASSUMED, self.place, self.key, "", self.absent) if self.absent else None
        value = document[self.key]
        if self.is_plain(value) or (value is None and self._takes_null):
            return None
        return Finding(self.treatment, self.place, self.key, shown(value), self.effect, self.hint)

    @property
    def _takes_null(self) -> bool:
        """Null asks for nothing, as false does; where false is not plain, null is another model too."""
        return self.treatment is Treatment.NEUTRALISED or self.is_plain(False)


def is_one_of(*plain: object) -> Callable[[Any], bool]:
    """Whether a value is one of these; true is not 1."""
    return lambda value: any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in plain)


def is_empty(value: Any) -> bool:
    """Whether a value says nothing: false, zero, an empty text, list or object."""
    return not value


def silent(place: str, *keys: str) -> Iterator[Setting]:
    """Known keys of which there is nothing to say here: the spec reads them, or no answer depends on them."""
    for key in keys:
        yield Setting(place, key)


def only(place: str, key: str, *plain: object, why: str, absent: str = "", hint: str | None = None) -> Setting:
    """A key that is refused with any other value."""
    listed = " or ".join(repr(one) for one in plain if one is not None)
    effect = f"only {listed} is supported: {why}"
    return Setting(place, key, Treatment.REFUSED, is_one_of(*plain), effect, absent, hint)


def refused(place: str, key: str, is_plain: Callable[[Any], bool], *, why: str, hint: str | None = None) -> Setting:
    """A key whose other values are refused."""
    return Setting(place, key, Treatment.REFUSED, is_plain, why, hint=hint)


def only_empty(place: str, key: str, *, why: str, hint: str | None = None) -> Setting:
    """A key that is refused when it says anything."""
    return refused(place, key, is_empty, why=why, hint=hint)


def ignored(place: str, key: str, *plain: object, effect: str) -> Setting:
    """A key whose other values have no effect here, which is said."""
    return Setting(place, key, Treatment.NEUTRALISED, is_one_of(*plain), effect)


def honoured(place: str, key: str, is_plain: Callable[[Any], bool], *, effect: str, absent: str = "") -> Setting:
    """A key whose other values take effect, which is said."""
    return Setting(place, key, Treatment.HONOURED, is_plain, effect, absent)


def with_default(place: str, key: str, *, absent: str) -> Setting:
    """A key that the spec reads, and what it takes where the key is missing."""
    return Setting(place, key, absent=absent)


def findings_of(table: Iterable[Setting], documents: Documents) -> list[Finding]:
    """What the settings of a table make of some files."""
    found = (setting.finding(documents) for setting in table)
    return [finding for finding in found if finding is not None]


def require_none_refused(findings: Iterable[Finding]) -> None:
    """Raises NvlmError that names every refused setting."""
    refused = [finding for finding in findings if finding.treatment is Treatment.REFUSED]
    if not refused:
        return
    said = "; ".join(_refusal(finding) for finding in refused)
    hint = next((finding.hint for finding in refused if finding.hint), None)
    raise NvlmError(said if len(refused) == 1 else f"{len(refused)} settings are refused: {said}", hint=hint)


def _refusal(finding: Finding) -> str:
    return f"{finding.place}: {finding.key} is {finding.value}; {finding.effect}"


def shown(value: object) -> str:
    """A value as it is written, of a long one its beginning."""
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN - 3]}..."
