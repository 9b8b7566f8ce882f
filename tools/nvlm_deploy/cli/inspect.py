"""`nvlm inspect`: the facts a checkpoint states, read from its settings files and headers only."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table

from nvlm_deploy.cli.options import CheckpointArgument, JsonOption
from nvlm_deploy.errors import NvlmError

if TYPE_CHECKING:
    from nvlm_deploy.checkpoint.reader import Checkpoint
    from nvlm_deploy.model.spec import ModelSpec

Facts = Mapping[str, Mapping[str, object]]

NEEDED, OPTIONAL = "missing: `nvlm build` needs it", "not there, not needed"


def register(app: typer.Typer) -> None:
    app.command(name="inspect")(inspect)


def inspect(checkpoint: CheckpointArgument, json_output: JsonOption = False) -> None:
    """Print what a checkpoint holds: shapes, sizes, files, settings, licence. Reads headers, not weights.

    Ends with 1 when a file is missing that `nvlm build` needs.
    """
    try:
        facts = facts_of(checkpoint)
    except NvlmError as problem:
        if not json_output:
            _print(problem.details)
        raise
    if json_output:
        print(json.dumps(facts, indent=2))
    else:
        _print(facts)
    if NEEDED in facts["files"].values():
        raise typer.Exit(1)


def _print(facts: Facts) -> None:
    console = Console()
    for section, values in facts.items():
        table = Table(title=section, title_justify="left", show_header=False)
        for key, value in values.items():
            table.add_row(key, _text(value))
        console.print(table)


def _text(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return "\n".join(f"{key}: {_text(one)}" for key, one in value.items())
    if isinstance(value, list | tuple):
        return ("\n" if any(isinstance(one, str) and " " in one for one in value) else ", ").join(map(str, value))
    return str(value)


def facts_of(folder: Path) -> dict[str, dict[str, object]]:
    """Facts by section.

    Raises NvlmError for missing shards or tensors, shapes that contradict config.json, settings that are refused and a
    tokenizer of another model.
    """
    from nvlm_deploy.checkpoint.reader import Checkpoint
    from nvlm_deploy.model.inventory import require_tensors, sizes_by_part
    from nvlm_deploy.model.licence import licence_of
    from nvlm_deploy.model.spec import require_nvlm, spec_from_checkpoint

    checkpoint = Checkpoint.open(folder)
    require_nvlm(checkpoint.config)
    settings = _settings_of(checkpoint)
    spec = spec_from_checkpoint(checkpoint)
    unexpected = require_tensors(checkpoint, spec)
    _require_tokenizer(checkpoint, spec)
    parts = sizes_by_part(checkpoint)
    return {
        "checkpoint": {
            "folder": str(folder),
            "shards": len(checkpoint.shards),
            "tensors": len(checkpoint.names),
            "unexpected tensors": ", ".join(unexpected) or "none",
            "dtypes": ", ".join(sorted({info.dtype for info in checkpoint.infos.values()})),
            "licence": licence_of(folder, spec),
        },
        "files": _files_of(checkpoint),
        **({"settings": settings} if settings else {}),
        **{part: dict(values) for part, values in parts.items()},
        **{f"{name} spec": values for name, values in dataclasses.asdict(spec).items()},
    }


def _settings_of(checkpoint: Checkpoint) -> dict[str, object]:
    """The settings with something to say, by group. Raises NvlmError with all of them when one is refused."""
    from nvlm_deploy.model.foreign.settings import foreign_settings

    settings = foreign_settings(checkpoint)
    try:
        settings.require_none_refused()
    except NvlmError as problem:
        details = {"settings": settings.as_json()}
        raise NvlmError(problem.message, hint=problem.hint, details=details) from None
    return settings.as_json()


def _files_of(checkpoint: Checkpoint) -> dict[str, object]:
    """What is there of the files that `nvlm build` reads; missing shards are an error before."""
    from nvlm_deploy.checkpoint.reader import INDEX_NAME, TOKENIZER_NAME
    from nvlm_deploy.model.foreign.settings import SETTINGS_FILES

    index = {INDEX_NAME: "there"} if (checkpoint.folder / INDEX_NAME).is_file() else {}
    shards = {shard.name: "there" for shard in checkpoint.shards}
    states = {
        name: "there" if (checkpoint.folder / name).is_file() else NEEDED if name == TOKENIZER_NAME else OPTIONAL
        for name in SETTINGS_FILES
    }
    return {"config.json": "there", **index, **shards, **states}


def _require_tokenizer(checkpoint: Checkpoint, spec: ModelSpec) -> None:
    """As `nvlm build` does first; a missing one is listed instead."""
    from nvlm_deploy.checkpoint.reader import TOKENIZER_NAME
    from nvlm_deploy.model.prompt import PromptBuilder

    path = checkpoint.folder / TOKENIZER_NAME
    if path.is_file():
        PromptBuilder(path, spec).require_matches(spec)
