"""`nvlm verify` and `nvlm sign`: is it, byte for byte, what was built, and by whom? Exit code 1 when it is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from nvlm_deploy.cli.options import JsonOption

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

    One line for each artifact, and one for each thing that is missing, changed or added, with its mend.
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
    json_output: JsonOption = False,
) -> None:
    """Sign every artifact below a folder, after a look at all of its bytes.

    openssl genpkey -algorithm ed25519 -out key.pem; openssl pkey -in key.pem -pubout -out public.pem
    """
    from nvlm_deploy.signature import private_key
    from nvlm_deploy.signature import sign as sign_artifact
    from nvlm_deploy.verification import artifact_folders

    owner = private_key(key)
    written = [str(sign_artifact(artifact, owner)) for artifact in artifact_folders(folder)]
    print(json.dumps({"signatures": written})) if json_output else print("\n".join(written))


def _print(found: Verification) -> None:
    console = Console(highlight=False, soft_wrap=True)
    for artifact in found.artifacts:
        console.print("ok  " if artifact.passed else "NO  ", style="green" if artifact.passed else "bold red", end="")
        console.print(_line(artifact), markup=False)
        for problem in artifact.problems:
            console.print(f"    {problem.what}\n    fix: {problem.mend}", markup=False)
        for folder in artifact.unchecked:
            console.print(f"    not looked at: calibration list {folder} is not on this machine", markup=False)
    size = sum(artifact.size_bytes for artifact in found.artifacts)
    wrong = sum(not artifact.passed for artifact in found.artifacts)
    amount = f"{len(found.artifacts)} artifacts, {size / 1e9:.3f} GB in {found.seconds:.2f} s"
    console.print(f"{amount}: {f'{wrong} not as built' if wrong else 'all as built'}")


def _line(artifact: Verified) -> str:
    manifest = artifact.manifest
    if manifest is None:
        return str(artifact.folder)
    profile = (manifest.profile or {}).get("name", "no profile named")
    return f"{artifact.folder} ({manifest.kind}, {profile}, {manifest.evidence}; {artifact.files} files)"
