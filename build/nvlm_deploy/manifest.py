"""manifest.json: what an artifact says of itself, read strictly and sealed."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from nvlm_deploy.errors import NvlmError, faults_of
from nvlm_deploy.places import require_folder

MANIFEST_NAME = "manifest.json"
EVIDENCE_LEVELS = ("measured", "contract-checked", "published", "derived", "not run")
LICENCE_NOTE = "derived from the named checkpoint; NVLM-D-72B weights are CC-BY-NC-4.0 (non-commercial)"
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
_STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True)
class CalibrationList:
    """The samples behind the scales: where they were read from, and SHA-256 by path below it."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    folder: str
    files: Mapping[str, Sha256]


@dataclass(frozen=True)
class Manifest:
    """What an artifact is and where it came from.

    `outputs` and `inputs` map names to SHA-256, a name that ends with a slash is an empty folder; `key` is the digest
    of inputs and settings that decides "up to date". `profile` is all of it, `fingerprints` what the engines are bound
    to, by the step that built them (fingerprint.py). `seal` is the digest of everything else here.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    kind: str
    key: str
    inputs: Mapping[str, str]
    settings: Mapping[str, Any]
    outputs: Mapping[str, Sha256]
    evidence: Annotated[str, Field(pattern=f"^({'|'.join(EVIDENCE_LEVELS)})$")]
    tools: Mapping[str, str]
    created: str = field(default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
    licence: str = LICENCE_NOTE
    notes: Mapping[str, Any] = field(default_factory=dict)
    profile: Mapping[str, Any] | None = None
    calibration: Sequence[CalibrationList] = ()
    fingerprints: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    seal: str = ""

    @property
    def sealed(self) -> Manifest:
        """Itself with its seal, as it will be read: JSON knows neither tuples nor numbers as keys."""
        read = _SHAPE.validate_json(json.dumps(asdict(replace(self, seal=""))))
        return replace(read, seal=sha256_of_json(asdict(read)))

    @property
    def text(self) -> str:
        """As it stands in the file, byte for byte."""
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"


_SHAPE = TypeAdapter(Manifest)


def sha256_of_json(value: object) -> str:
    """SHA-256 of a value by its canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Raises NvlmError when a folder has no manifest, or one with a byte other than it was written with."""
    require_folder(folder)
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise NvlmError(f"{folder} has no {MANIFEST_NAME}: not a finished artifact", hint="`nvlm build` makes it")
    hint = f"remove {folder} and build it again"
    text = path.read_bytes()
    try:
        manifest = _SHAPE.validate_json(text)
    except ValidationError as problem:
        raise NvlmError(f"{path} is damaged: {faults_of(problem)}", hint=hint) from None
    if not manifest.seal:
        raise NvlmError(f"{path} is damaged: its seal is missing, so nothing vouches for what it says", hint=hint)
    if manifest.text.encode() != text or manifest.sealed.seal != manifest.seal:
        raise NvlmError(f"{path} is damaged: it was changed after it was written", hint=hint)
    return manifest
