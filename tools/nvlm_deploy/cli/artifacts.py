"""`nvlm artifacts list` and `prune`: what a workspace stores, and which of it can go."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nvlm_deploy.cli.lines import wrapped
from nvlm_deploy.cli.options import DryRunOption, JsonOption
from nvlm_deploy.cli.verbs import Verbs

if TYPE_CHECKING:
    from nvlm_deploy.workspace import Stored

WorkspaceArgument = Annotated[Path, typer.Argument(help="The folder that `nvlm build --workspace` got.")]
_MOST_SHOWN = 6


def register(app: typer.Typer) -> None:
    group = typer.Typer(cls=Verbs, help="What a workspace stores: list it, remove what is not current.")
    group.command(name="list")(list_artifacts)
    group.command(name="prune")(prune)
    app.add_typer(group, name="artifacts")


def list_artifacts(workspace: WorkspaceArgument = Path(), json_output: JsonOption = False) -> None:
    """List every artifact: size, age, what it was made of, and whether it is current, set aside or unfinished.

    A build with another calibration list or choice sets the finished artifact aside; a build with the former one brings
    it back. An unfinished one is what an interrupted run left: the same command goes on with it.
    """
    from nvlm_deploy.workspace import stored_artifacts

    found = stored_artifacts(workspace)
    if json_output:
        print(json.dumps({"artifacts": [one.as_json() for one in found]}, indent=2))
        return
    for one in found:
        _print(one)
    print(_summary(found))


def prune(
    workspace: WorkspaceArgument = Path(),
    select: Annotated[
        list[str] | None, typer.Option("--select", help="Remove this one, by its name in the list; repeatable.")
    ] = None,
    older_than_days: Annotated[float, typer.Option(min=0, help="Only those that are at least so old.")] = 0.0,
    unfinished: Annotated[bool, typer.Option("--unfinished", help="Also what interrupted runs left.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Remove all that are set aside.")] = False,
    dry_run: DryRunOption = False,
    json_output: JsonOption = False,
) -> None:
    """Remove artifacts that are set aside; never a current one.

    Needs --yes, or --select NAME for each. One that a current artifact was made of is removed only by its name. Waits
    for no build: while one runs in the workspace, nothing is removed (exit code 3).
    """
    from nvlm_deploy.errors import NvlmError
    from nvlm_deploy.workspace import Selection, stored_artifacts
    from nvlm_deploy.workspace import prune as remove

    selection = Selection(tuple(select or ()), older_than_days, unfinished)
    chosen = selection.of(stored_artifacts(workspace))
    if chosen and not (yes or select or dry_run):
        freed = _size(sum(one.freed_bytes for one in chosen))
        raise NvlmError(
            f"{len(chosen)} of the artifacts would be removed, {freed}: {', '.join(one.name for one in chosen)}",
            hint="--yes removes them, --select NAME only that one, --dry-run shows more",
        )
    if (yes or select) and not dry_run:
        chosen = remove(workspace, selection)
    freed_bytes = sum(one.freed_bytes for one in chosen)
    if json_output:
        removed = [one.as_json() for one in chosen]
        print(json.dumps({"dry_run": dry_run, "removed": removed, "freed_bytes": freed_bytes}, indent=2))
        return
    for one in chosen:
        _print(one)
    verb = "would free" if dry_run else "freed"
    print(f"{verb} {_size(freed_bytes)}, {len(chosen)} removed" if chosen else "nothing to remove")


def _print(one: Stored) -> None:
    print(one.name)
    lines = [f"{one.status}, {one.kind}, {_size(one.size_bytes)}, {_age(one.age_s)} old"]
    if one.used_by:
        lines.append(f"read by the current {', '.join(one.used_by)}")
    if one.made_of:
        lines.append(f"made of: {_shown(one.made_of)}")
    if one.differs:
        lines.append(f"unlike the current: {_shown(one.differs)}")
    for line in lines:
        print(f"    {wrapped(line, first=4, rest=8)}")


def _shown(words: Sequence[str]) -> str:
    more = f"; and {len(words) - _MOST_SHOWN} more" if len(words) > _MOST_SHOWN else ""
    return "; ".join(words[:_MOST_SHOWN]) + more


def _summary(found: Sequence[Stored]) -> str:
    from nvlm_deploy.workspace import Status

    parts = []
    for status in Status:
        ones = [one for one in found if one.status is status]
        parts.append(f"{len(ones)} {status}, {_size(sum(one.size_bytes for one in ones))}")
    return "; ".join(parts)


def _size(size_bytes: int) -> str:
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB")):
        if size_bytes >= unit:
            return f"{size_bytes / unit:.1f} {name}"
    return f"{size_bytes / 1024:.1f} KiB"


def _age(seconds: float) -> str:
    for unit, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds:.0f} seconds"
