"""`nvlm verify` and `nvlm sign`: is it, byte for byte, what was built, and by whom? Exit code 1 when it is not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from nvlm_deploy.cli.lines import wrapped
from nvlm_deploy.cli.options import DryRunOption, JsonOption

if TYPE_CHECKING:
    from nvlm_deploy.verification import Verification, Verified

FolderArgument = Annotated[Path, typer.Argument(help="An artifact, an assembled repository, or a whole workspace.")]


def register(app: typer.Typer) -> None:
    app.command(name="verify")(verify)
    app.command(name="sign")(sign)


def verify(
    folder: FolderArgument,
    public_key: Annotated[
        Path | None, typer.Option(help="Also demand a signature by the owner of this Ed25519 key (PEM).")
    ] = None,
    ignore_calibration: Annotated[
        bool, typer.Option("--ignore-calibration", help="Do not look whether calibration lists are as they were.")
    ] = False,
    json_output: JsonOption = False,
) -> None:
    """Compare every file, config and manifest with what was built, and calibration lists that are on this machine.

    One line for each artifact, and one for each thing that is missing, changed or added, with its mend. A calibration
    list that is not on this machine is said to be so, and no fault: what was made of it is. Exit code 1 for a fault.
    """
    from nvlm_deploy.signature import public_key as key_in
    from nvlm_deploy.verification import Demand, verify_below

    key = None if public_key is None else key_in(public_key)
    found = verify_below(folder, Demand(key, calibration=not ignore_calibration))
    print(json.dumps(found.as_json(), indent=2)) if json_output else _print(found)
    raise typer.Exit(0 if found.passed else 1)


def sign(
    folder: FolderArgument,
    key: Annotated[Path, typer.Option(help="Ed25519 private key, a PEM file without a password.")],
    dry_run: DryRunOption = False,
    json_output: JsonOption = False,
) -> None:
    """Sign every artifact below a folder, after a look at all of their bytes: where one is damaged, none is signed.

    openssl genpkey -algorithm ed25519 -out key.pem

    openssl pkey -in key.pem -pubout -out public.pem
    """
    from nvlm_deploy.signature import private_key
    from nvlm_deploy.signature import sign as sign_artifacts
    from nvlm_deploy.verification import artifact_folders

    written = [str(path) for path in sign_artifacts(artifact_folders(folder), private_key(key), dry_run=dry_run)]
    print(json.dumps({"signatures": written})) if json_output else print("\n".join(written))


def _print(found: Verification) -> None:
    console = Console(highlight=False, soft_wrap=True, emoji=False)
    for artifact in found.artifacts:
        console.print("ok  " if artifact.passed else "NO  ", style="green" if artifact.passed else "bold red", end="")
        console.print(wrapped(_line(artifact), first=4, rest=4), markup=False)
        for problem in artifact.problems:
            console.print(f"    {wrapped(problem.what, first=4, rest=4)}", markup=False)
            console.print(f"    fix: {wrapped(problem.mend, first=9, rest=9)}", markup=False)
    notes = list(dict.fromkeys(note for artifact in found.artifacts for note in artifact.not_looked_at))
    for note in notes:
        console.print(wrapped(f"not looked at: {note}", first=0, rest=4), markup=False)
    console.print(wrapped(_summary(found, notes), first=0, rest=2), markup=False)


def _summary(found: Verification, notes: Sequence[str]) -> str:
    size = sum(artifact.size_bytes for artifact in found.artifacts)
    wrong = sum(not artifact.passed for artifact in found.artifacts)
    amount = f"{_count(len(found.artifacts), 'artifact')}, {size / 1e9:.3f} GB in {found.seconds:.2f} s"
    verdict = f"{wrong} not as built" if wrong else "all as built"
    return f"{amount}: {verdict}" + (f"; {len(notes)} not looked at, see above" if notes else "")


def _line(artifact: Verified) -> str:
    manifest = artifact.manifest
    if manifest is None:
        return str(artifact.folder)
    profile = (manifest.profile or {}).get("name", "no profile named")
    return f"{artifact.folder} ({manifest.kind}, {profile}, {manifest.evidence}; {_count(artifact.files, 'file')})"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
