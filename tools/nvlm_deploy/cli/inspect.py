"""`nvlm inspect`: the facts a checkpoint states, read from config.json and headers only."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from nvlm_deploy.cli.options import CheckpointArgument, JsonOption
from nvlm_deploy.manifest import LICENCE_NOTE


def register(app: typer.Typer) -> None:
    app.command(name="inspect")(inspect)


def inspect(checkpoint: CheckpointArgument, json_output: JsonOption = False) -> None:
    """Print what a checkpoint holds: shapes, sizes, missing shards and tensors, licence. Reads headers, not weights."""
    facts = facts_of(checkpoint)
    if json_output:
        print(json.dumps(facts, indent=2))
        return
    console = Console()
    for section, values in facts.items():
        table = Table(title=section, title_justify="left", show_header=False)
        for key, value in values.items():
            table.add_row(key, f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value))
        console.print(table)


def facts_of(folder: Path) -> dict[str, dict[str, object]]:
    """Facts by section. Raises NvlmError for missing shards or tensors, or shapes that contradict config.json."""
    from nvlm_deploy.checkpoint.reader import Checkpoint
    from nvlm_deploy.model.inventory import require_tensors, sizes_by_part
    from nvlm_deploy.model.spec import spec_from_checkpoint

    checkpoint = Checkpoint.open(folder)
    spec = spec_from_checkpoint(checkpoint)
    unexpected = require_tensors(checkpoint, spec)
    parts = sizes_by_part(checkpoint)
    return {
        "checkpoint": {
            "folder": str(folder),
            "shards": len(checkpoint.shards),
            "tensors": len(checkpoint.names),
            "unexpected tensors": ", ".join(unexpected) or "none",
            "dtypes": ", ".join(sorted({info.dtype for info in checkpoint.infos.values()})),
            "licence": LICENCE_NOTE,
        },
        **{part: dict(values) for part, values in parts.items()},
        **{f"{name} spec": values for name, values in dataclasses.asdict(spec).items()},
    }
