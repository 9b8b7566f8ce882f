"""Is what lies here what was built? One artifact, an assembled repository or a whole workspace, all of it, at once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvlm_deploy.artifacts import changes, files_of, some
from nvlm_deploy.checkpoint.reader import INDEX_NAME
from nvlm_deploy.digest import KnownDigests
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.fingerprint import fingerprints_of
from nvlm_deploy.manifest import MANIFEST_NAME, CalibrationList, Manifest, read_manifest
from nvlm_deploy.places import require_folder
from nvlm_deploy.samples import SAMPLES_NAME
from nvlm_deploy.signature import require_signature
from nvlm_deploy.slots import is_slot

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

# what only steps of ours write: where one of them lies, a manifest must
_MARKS = ("*/config.pbtxt", "vision.onnx", "vision.plan", "rank[0-9]*", "calibration.json", INDEX_NAME)
_PARTS_OF_WORKSPACE = ("engines", "triton_repo")
# how a step's inputs are called that are files of its calibration list
CALIBRATION_INPUT = "calibration "
_FETCH = "`nvlm build` makes it anew; or fetch it again"


@dataclass(frozen=True)
class Problem:
    """One thing that is not as it was built, and its mend."""

    what: str
    mend: str


@dataclass(frozen=True)
class Verified:
    """One artifact: what it says of itself, and every problem found; the manifest is None where it cannot be read.

    `not_looked_at` says what nothing vouches for: calibration lists that are elsewhere, what else is beside those that
    are here, caches.
    """

    folder: Path
    manifest: Manifest | None
    problems: Sequence[Problem]
    files: int = 0
    size_bytes: int = 0
    not_looked_at: Sequence[str] = ()

    @property
    def passed(self) -> bool:
        return not self.problems

    def as_json(self) -> dict[str, Any]:
        manifest = self.manifest
        said: Mapping[str, Any] = {}
        if manifest is not None:
            said = {
                "kind": manifest.kind,
                "created": manifest.created,
                "evidence": manifest.evidence,
                "licence": manifest.licence,
                "profile": (manifest.profile or {}).get("name"),
                "fingerprints": dict(manifest.fingerprints),
            }
        return {
            "folder": str(self.folder),
            "passed": self.passed,
            "problems": [vars(problem) for problem in self.problems],
            **said,
            "files": self.files,
            "bytes": self.size_bytes,
            "not_looked_at": list(self.not_looked_at),
        }


@dataclass(frozen=True)
class Verification:
    """Of all artifacts below a folder."""

    artifacts: Sequence[Verified]
    seconds: float

    @property
    def passed(self) -> bool:
        return all(artifact.passed for artifact in self.artifacts)

    def as_json(self) -> dict[str, Any]:
        size = sum(artifact.size_bytes for artifact in self.artifacts)
        return {
            "passed": self.passed,
            "artifacts": [artifact.as_json() for artifact in self.artifacts],
            "bytes": size,
            "seconds": round(self.seconds, 3),
            "gigabytes_per_second": round(size / max(self.seconds, 1e-9) / 1e9, 3),
        }


@dataclass(frozen=True)
class Demand:
    """What is asked beyond the files: a signature by this key; calibration lists where they were read from."""

    public_key: Ed25519PublicKey | None = None
    calibration: bool = True


DEFAULT_DEMAND = Demand()


def verify_below(folder: Path, demand: Demand = DEFAULT_DEMAND) -> Verification:
    """Every artifact in `folder`; a file with several links is read once. Raises NvlmError where there is none."""
    started, once = time.monotonic(), KnownDigests()
    found = [verified(artifact, _demand_of(artifact, demand), once) for artifact in artifact_folders(folder)]
    return Verification(found, time.monotonic() - started)


def _demand_of(artifact: Path, demand: Demand) -> Demand:
    """Return what is asked of an artifact. One that was set aside was made of a list that may have changed since."""
    return replace(demand, calibration=False) if is_slot(artifact) else demand


def artifact_folders(folder: Path) -> list[Path]:
    """Itself, or those below it; also what looks like an artifact and has no manifest. Raises NvlmError for none.

    Of a workspace only `engines/` and `triton_repo/`: it may be a whole checkout.
    """
    require_folder(folder)
    parts = [folder / name for name in _PARTS_OF_WORKSPACE if (folder / name).is_dir()]
    below = [part for part in parts if not _is_artifact(folder)] or [folder]
    by_place = {artifact.resolve(): artifact for part in below for artifact in _walk(part)}
    found = sorted(by_place.values())
    if not found:
        raise NvlmError(
            f"{folder} holds no artifact: no {MANIFEST_NAME} in it or below",
            hint="name a folder that `nvlm build` made: an artifact, a repository or a workspace",
        )
    return found


def _walk(folder: Path) -> Iterator[Path]:
    if _is_artifact(folder):
        yield folder
        return
    try:
        below = sorted(folder.iterdir())
    except OSError:  # whatever it holds cannot be vouched for
        yield folder
        return
    for path in below:
        if path.is_symlink():
            yield from _behind(path)
        elif path.is_dir() and not path.name.startswith((".", "__")):
            yield from _walk(path)


def _behind(link: Path) -> Iterator[Path]:
    """An artifact on another disk, or a folder of them: served like any other. Deeper would be anywhere."""
    if _is_artifact(link):
        yield link
    elif link.is_dir():
        yield from (path for path in sorted(link.iterdir()) if _is_artifact(path))


def _is_artifact(folder: Path) -> bool:
    try:
        return (folder / MANIFEST_NAME).is_file() or any(True for mark in _MARKS for _ in folder.glob(mark))
    except OSError:  # looked at all the same: then it is said what cannot be read
        return True


def verified(folder: Path, demand: Demand = DEFAULT_DEMAND, once: KnownDigests | None = None) -> Verified:
    """Never raises for what it finds in the folder: that is the answer."""
    try:
        return _looked_at(folder, demand, KnownDigests() if once is None else once)
    except NvlmError as problem:
        return Verified(folder, None, [_problem(problem)])
    except PermissionError as problem:
        mend = f"let this user read it: `chmod -R a+rX {folder}`, or run as the user who built it"
        return Verified(folder, None, [Problem(f"{problem.filename} cannot be read: {problem.strerror}", mend)])
    except OSError as problem:
        return Verified(folder, None, [Problem(f"{problem.filename} cannot be read: {problem.strerror}", _FETCH)])


def _looked_at(folder: Path, demand: Demand, once: KnownDigests) -> Verified:
    manifest = read_manifest(folder)
    fingerprints_of(manifest, str(folder))
    problems = [Problem(change, _FETCH) for change in changes(folder, manifest, once.of)]
    problems += _signature_problems(folder, demand.public_key)
    lists = manifest.calibration if demand.calibration else ()
    problems += [problem for one in lists for problem in calibration_problems(one, once)]
    sizes = [path.stat().st_size for path in files_of(folder).values() if path.is_file()]
    notes = [note for one in lists for note in _unlooked(one)]
    if any(folder.rglob("__pycache__")):
        notes.append(f"Python's caches in {folder}: `nvlm serve` removes them, a bare tritonserver would run them")
    return Verified(folder, manifest, problems, len(sizes), sum(sizes), notes)


def _signature_problems(folder: Path, key: Ed25519PublicKey | None) -> list[Problem]:
    try:
        if key is not None:
            require_signature(folder, key)
    except NvlmError as problem:
        return [_problem(problem)]
    return []


def calibration_problems(recorded: CalibrationList, once: KnownDigests) -> list[Problem]:
    """What a calibration list holds otherwise than when the scales were made of it; none where it is not here."""
    folder, files = Path(recorded.folder), recorded.files
    if not folder.is_dir():
        return []
    present = {name: folder / name for name in files if (folder / name).is_file()}
    found = once.of(present.values())
    wrong = [f"{name} missing" for name in sorted(files.keys() - present.keys())]
    wrong += [f"{name} changed" for name, path in sorted(present.items()) if found[path] != files[name]]
    mend = "put the list back as it was, or `nvlm build` with the new one"
    return [Problem(f"calibration list {folder}: {some(wrong)}", mend)] if wrong else []


def _unlooked(recorded: CalibrationList) -> Iterator[str]:
    """A list that is elsewhere, and files beside a list that is here: no scale was made of them."""
    folder = Path(recorded.folder)
    if not folder.is_dir():
        yield f"calibration list {folder} is not on this machine"
        return
    beside = sorted(files_of(folder).keys() - recorded.files.keys())
    if beside:
        yield f"{len(beside)} of the files in {folder}: the list does not use {some(beside, 2)}"


def _problem(problem: NvlmError) -> Problem:
    return Problem(problem.message, problem.hint or "build it again")


def calibration_of(inputs: Mapping[str, Path], digests: Mapping[str, str]) -> list[CalibrationList]:
    """The calibration list among a step's inputs, as manifests record it; none where there is none.

    Its files are the inputs whose names begin with CALIBRATION_INPUT, and end as they are called below its folder.
    """
    names = {name.removeprefix(CALIBRATION_INPUT): name for name in inputs if name.startswith(CALIBRATION_INPUT)}
    if SAMPLES_NAME not in names:
        return []
    # a path need not be UTF-8, JSON must
    folder = bytes(inputs[names[SAMPLES_NAME]].absolute().parent).decode("utf-8", "backslashreplace")
    return [CalibrationList(folder, {below: digests[name] for below, name in names.items()})]
