"""What a run that may be killed leaves for the next one: trusted where it is byte for byte as it was written."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nvlm_deploy.artifacts import write_text
from nvlm_deploy.checkpoint.reader import Checkpoint, read_header, read_json
from nvlm_deploy.errors import MachineError, NvlmError
from nvlm_deploy.manifest import sha256_of_json

PROGRESS_NAME = "progress.json"
_SEAL = "seal"


class DamagedStatesError(MachineError):
    """A file holds other hidden states than were written there, or is gone."""


def write_sealed_json(path: Path, document: Mapping[str, Any]) -> None:
    """With its own digest in it. Numbers as keys become text, as in all JSON."""
    as_read = json.loads(json.dumps(document))
    write_text(path, json.dumps({**as_read, _SEAL: sha256_of_json(as_read)}, indent=1) + "\n")


def read_sealed_json(path: Path) -> dict[str, Any] | None:
    """None for a file that is missing or holds another byte than was written."""
    try:
        document = read_json(path)
    except (NvlmError, OSError):
        return None
    seal = document.pop(_SEAL, None)
    return document if seal == sha256_of_json(document) else None


def record_progress(folder: Path, digest: str, finished: Mapping[str, Any]) -> None:
    """From here a run goes on that is killed now; `digest` says what it was a run of."""
    write_sealed_json(folder / PROGRESS_NAME, {"digest": digest, **finished})


def recorded_progress(folder: Path, digest: str) -> dict[str, Any] | None:
    """What was recorded last; None where it was of another `digest`, or is damaged."""
    document = read_sealed_json(folder / PROGRESS_NAME)
    return document if document is not None and document["digest"] == digest else None


def checksum_of(states: torch.Tensor) -> int:
    """CRC-32 of a tensor's bytes."""
    return zlib.crc32(states.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def read_states(path: Path, name: str, checksum: int | None) -> torch.Tensor:
    """A tensor of a safetensors file. Raises DamagedStatesError when it has another checksum, or cannot be read.

    Read, not mapped: mapped pages would stay this process's memory.
    """
    hint = "check the disk, then run the same command again"
    try:
        stored = Checkpoint(path.parent, {}, {info.name: info for info in read_header(path)})
        states = torch.cat([*stored.chunks(name)])
    except (NvlmError, OSError) as problem:
        raise DamagedStatesError(f"{path} is not what was written there: {problem}", hint=hint) from problem
    if checksum_of(states) != checksum:
        raise DamagedStatesError(f"{path} is not what was written there: {name} differs", hint=hint)
    return states
