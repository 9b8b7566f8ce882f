"""What a checkpoint's folder says of its licence. No torch."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from nvlm_deploy.model.released import NVLM_D_72B
from nvlm_deploy.model.spec import ModelSpec, spec_from_config

NVLM_D_72B_LICENCE = "CC-BY-NC-4.0 (non-commercial), NVLM-D-72B's"
_FILES = re.compile(r"(LICENSE|LICENCE|COPYING|NOTICE)", re.IGNORECASE)
# a model card begins with lines of YAML between two lines of dashes
_CARD = re.compile(r"\A---\s*\n(.*?)\n---\s*$", re.DOTALL | re.MULTILINE)
_STATED = re.compile(r"^license(?:_name)?:[ \t]*(\S.*?)\s*$", re.MULTILINE)


def licence_of(folder: Path, spec: ModelSpec) -> str:
    """One line: what the model card or a licence file says, and NVLM-D-72B's for a model of its shapes."""
    said = [*_of_card(folder / "README.md"), *_of_files(folder)]
    if _has_released_shapes(spec):
        said.insert(0, NVLM_D_72B_LICENCE)
    return ", ".join(said) or "not stated in the folder: ask whoever made the checkpoint"


def _of_card(card: Path) -> list[str]:
    if not card.is_file():
        return []
    head = _CARD.search(card.read_text(encoding="utf-8", errors="replace"))
    stated = dict.fromkeys(value.strip("'\"") for value in _STATED.findall(head.group(1))) if head else {}
    return [f"{value} (README.md)" for value in stated]


def _of_files(folder: Path) -> list[str]:
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and _FILES.match(path.name))
    return [f"see {name}" for name in names]


def _has_released_shapes(spec: ModelSpec) -> bool:
    """Whether vision encoder and decoder have NVLM-D-72B's sizes; a fine-tuned copy has them too, and its licence."""
    released = spec_from_config(NVLM_D_72B)
    vision = replace(spec.vision, padded_heads=released.vision.padded_heads)
    decoder = replace(spec.decoder, max_positions=released.decoder.max_positions)
    return (vision, decoder) == (released.vision, released.decoder)
