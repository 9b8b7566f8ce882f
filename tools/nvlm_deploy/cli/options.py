"""Options that several verbs share, declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

CheckpointArgument = Annotated[Path, typer.Argument(help="Folder with config.json and the safetensors shards.")]
ProfileOption = Annotated[str, typer.Option("--profile", "-p", help="A profile's name, or the path of its .toml file.")]
WorkspaceOption = Annotated[
    Path, typer.Option("--workspace", help="Folder that gets engines/PROFILE/ and triton_repo/PROFILE/.")
]
CalibrationOption = Annotated[
    Path | None, typer.Option("--calibration", help="Folder with samples.jsonl and its images, for FP8 scales.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, also on failure.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Build again what is up to date.")]
ContainerImageOption = Annotated[
    str, typer.Option("--container-image", help="How your registry calls the image that a dry run's commands name.")
]
