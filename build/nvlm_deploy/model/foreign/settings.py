"""ForeignSettings: what a checkpoint's files ask for beside its weights, and what becomes of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nvlm_deploy.checkpoint.reader import Checkpoint, optional_json
from nvlm_deploy.model.foreign.relations import relations
from nvlm_deploy.model.foreign.setting import (
    GENERATION,
    PREPROCESSOR,
    TOKENIZER,
    TOKENIZER_CONFIG,
    Documents,
    Finding,
    Treatment,
    findings_of,
    require_none_refused,
)
from nvlm_deploy.model.foreign.table import KNOWN, TABLE
from nvlm_deploy.model.spec import ModelSpec, spec_from_checkpoint

log = logging.getLogger(__name__)

# beside config.json; none but tokenizer.json is needed
SETTINGS_FILES = (GENERATION, TOKENIZER, TOKENIZER_CONFIG, PREPROCESSOR)


@dataclass(frozen=True)
class ForeignSettings:
    """Everything there is to say of a checkpoint's settings, and the keys that nvlm does not know, by file."""

    findings: tuple[Finding, ...]
    unknown: Mapping[str, tuple[str, ...]]

    def of(self, treatment: Treatment) -> list[Finding]:
        """The findings of one treatment."""
        return [finding for finding in self.findings if finding.treatment is treatment]

    def lines(self, treatment: Treatment) -> list[str]:
        """One line for all settings of a file that share an effect."""
        shared: dict[tuple[str, str], list[str]] = {}
        for finding in self.of(treatment):
            shared.setdefault((finding.place, finding.effect), []).append(finding.setting)
        return [f"{place}: {', '.join(settings)}: {effect}" for (place, effect), settings in shared.items()]

    def as_json(self) -> dict[str, Any]:
        """Lines by treatment and unknown keys by file; what is empty is left out."""
        by_treatment = {str(treatment): self.lines(treatment) for treatment in Treatment}
        unknown = {"not known to nvlm": {place: list(keys) for place, keys in self.unknown.items()}}
        return {name: value for name, value in (by_treatment | unknown).items() if value}

    def require_none_refused(self) -> None:
        """Raises NvlmError that names every refused setting."""
        require_none_refused(self.findings)

    def warn(self) -> None:
        """Log what is not obeyed, and what is used in the place of missing keys."""
        for line in (*self.lines(Treatment.NEUTRALISED), *self.lines(Treatment.ASSUMED)):
            log.warning("%s", line)


def foreign_settings(checkpoint: Checkpoint, spec: ModelSpec | None = None) -> ForeignSettings:
    """Judge the settings of a checkpoint; without its `spec`, that is read, where config.json allows one."""
    documents = documents_of(checkpoint)
    findings = findings_of(TABLE, documents)
    refused = any(finding.treatment is Treatment.REFUSED for finding in findings)
    if spec is not None or not refused:
        findings += relations(documents, checkpoint, spec or spec_from_checkpoint(checkpoint))
    return ForeignSettings(tuple(findings), _unknown(documents))


def documents_of(checkpoint: Checkpoint) -> Documents:
    """The settings files that are there. Raises NvlmError for one that is no JSON object."""
    others = {name: optional_json(checkpoint.folder / name) for name in SETTINGS_FILES}
    return Documents.of_config(checkpoint.config, {name: found for name, found in others.items() if found is not None})


def _unknown(documents: Documents) -> dict[str, tuple[str, ...]]:
    """Keys that the table does not have; those that start with `_` are Hugging Face's bookkeeping."""
    unknown = {
        place: tuple(key for key in document if (place, key) not in KNOWN and not key.startswith("_"))
        for place, document in documents.places.items()
    }
    return {place: keys for place, keys in unknown.items() if keys}
