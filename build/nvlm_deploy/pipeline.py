"""Step and Pipeline: the order of a build, the up-to-date test, dry run, resume."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, TextIO

from nvlm_deploy.artifacts import (
    JOURNAL_NAME,
    Artifact,
    clear_partial,
    digests,
    disk_errors,
    replace_folder,
    resumable_folder,
    tool_versions,
    verify,
    write_manifest,
)
from nvlm_deploy.digest import KNOWN_DIGESTS
from nvlm_deploy.errors import MachineError, NvlmError
from nvlm_deploy.fingerprint import Fingerprint, cohort_versions
from nvlm_deploy.manifest import MANIFEST_NAME, Manifest, read_manifest, sha256_of_json
from nvlm_deploy.verification import calibration_of

log = logging.getLogger(__name__)


class State(StrEnum):
    """What a step found or did."""

    UP_TO_DATE = "up to date"
    TO_BUILD = "to build"
    BUILT = "built"


@dataclass(frozen=True)
class Step:
    """Makes one artifact folder out of named inputs.

    `make` fills a fresh folder and returns notes for the manifest. `settings` are the choices that, with the inputs'
    content, decide whether an existing artifact is up to date; bump `revision` when `make` itself changes its output.
    A step that `resumes` finds in its folder what a killed run of the same key wrote. `bound_to` is asked, when the
    output is made, which machine it runs on; None when on any.
    """

    name: str
    output: Path
    inputs: Mapping[str, Path]
    settings: Mapping[str, Any]
    make: Callable[[Path], Mapping[str, Any]] = field(repr=False)
    tools: Sequence[str] = ()
    evidence: str = "measured"
    revision: int = 1
    resumes: bool = False
    bound_to: Callable[[], Fingerprint | None] | None = field(default=None, repr=False)

    @cached_property
    def input_digests(self) -> dict[str, str]:
        KNOWN_DIGESTS.of(path for path in self.inputs.values() if path.is_file())  # side by side
        return {name: digest_of_input(path) for name, path in self.inputs.items()}

    @property
    def key(self) -> str:
        return sha256_of_json([self.name, self.revision, self.input_digests, dict(self.settings)])


def digest_of_input(path: Path) -> str:
    """A file's SHA-256; a finished artifact's over what its manifest says of its files; any other folder's over them.

    Raises NvlmError for an artifact whose files are not what its manifest says: nothing is made of it.
    """
    if not path.exists():
        raise NvlmError(f"no input {path}", hint="run the steps before this one: `nvlm build` runs all")
    if path.is_file():
        return KNOWN_DIGESTS.of([path])[path]
    if (path / MANIFEST_NAME).is_file():
        return sha256_of_json(dict(_verified(path).manifest.outputs))
    return sha256_of_json(digests(path))


def _verified(folder: Path) -> Artifact:
    """As `verify`, once for as long as no file there changes: several steps read the same artifact."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return _verified_once(folder, *((path, *_file_state(path)) for path in files))


@lru_cache(maxsize=256)
def _verified_once(folder: Path, *_states: tuple[Path | int, ...]) -> Artifact:
    return verify(folder, KNOWN_DIGESTS.of)


def _file_state(path: Path) -> tuple[int, int, int]:
    state = path.stat()
    return state.st_ino, state.st_size, state.st_mtime_ns


def state_of(step: Step) -> State:
    """Up to date when the artifact's key is this step's and its files are what its manifest says."""
    if not step.output.exists():
        return State.TO_BUILD
    try:
        artifact = _verified(step.output)
    except NvlmError as problem:
        log.warning("%s: %s", step.name, problem.message)
        return State.TO_BUILD
    return State.UP_TO_DATE if artifact.manifest.key == step.key else State.TO_BUILD


def require_current(step: Step) -> None:
    """Raises NvlmError where a step's artifact is missing, damaged, or made of other inputs or with other choices."""
    hint = f"`nvlm {step.name}` with this checkpoint and profile, or `nvlm build` for all steps"
    if not step.output.exists():
        raise NvlmError(f"no {step.output}", hint=hint)
    manifest = _verified(step.output).manifest
    if manifest.key != step.key:
        differing = ", ".join(_differences(step, manifest)) or "another version of this tool made it"
        raise NvlmError(f"{step.output} is not what would be made now: {differing}", hint=hint)


def _differences(step: Step, manifest: Manifest) -> Iterator[str]:
    made, now = dict(manifest.settings), dict(step.settings)
    for name in sorted(made.keys() | now.keys()):
        if made.get(name) != now.get(name):
            yield f"{name} was {made.get(name)!r}, is {now.get(name)!r}"
    for name in sorted(manifest.inputs.keys() | step.input_digests.keys()):
        if manifest.inputs.get(name) != step.input_digests.get(name):
            yield f"input {name} differs"


def run_step(step: Step, *, force: bool = False, profile: Mapping[str, Any] | None = None) -> tuple[State, Artifact]:
    """Build a step's artifact unless it is up to date.

    An existing folder without a manifest is not ours and is refused, never overwritten.
    """
    key = step.key  # looks at all inputs: nothing is begun with one that is missing or damaged
    clear_partial(step.output, keep=key if step.resumes else None)
    _require_ours(step.output)
    if not force and state_of(step) is State.UP_TO_DATE:
        log.info("%s: up to date", step.name)
        return State.UP_TO_DATE, Artifact(step.output, read_manifest(step.output))
    log.info("%s: building %s", step.name, step.output)
    with resumable_folder(step.output, key) if step.resumes else replace_folder(step.output) as folder:
        if not _is_finished(folder, key):
            notes = step.make(folder)
            write_manifest(folder, _manifest(step, _output_digests(folder), notes, profile))
    return State.BUILT, Artifact(step.output, read_manifest(step.output))


def _is_finished(folder: Path, key: str) -> bool:
    """Whether a run was killed between writing the manifest, which is the last thing, and putting it all in place."""
    try:
        return read_manifest(folder).key == key
    except NvlmError:
        return False


def _output_digests(folder: Path) -> dict[str, str]:
    """Of what was made; what was linked from an input, or handed over by its writer, is not read again."""
    found = digests(folder, KNOWN_DIGESTS.of)
    return {name: sha256 for name, sha256 in found.items() if name != JOURNAL_NAME}


def _manifest(
    step: Step, outputs: Mapping[str, str], notes: Mapping[str, Any], profile: Mapping[str, Any] | None
) -> Manifest:
    """With what its inputs are bound to and were calibrated with: a repository says it for all that is in it."""
    before = [read_manifest(path) for path in step.inputs.values() if (path / MANIFEST_NAME).is_file()]
    bound_to = step.bound_to() if step.bound_to else None
    lists = calibration_of(step.inputs, step.input_digests)
    for one in (one for manifest in before for one in manifest.calibration):
        lists += [] if one in lists else [one]
    fingerprints = {name: print_ for manifest in before for name, print_ in manifest.fingerprints.items()}
    return Manifest(
        kind=step.name,
        key=step.key,
        inputs=step.input_digests,
        settings=step.settings,
        outputs=outputs,
        evidence=step.evidence,
        tools=cohort_versions() | tool_versions(step.tools),
        notes=notes,
        profile=profile,
        calibration=lists,
        fingerprints=fingerprints | ({step.name: bound_to.as_json()} if bound_to else {}),
    )


def _require_ours(folder: Path) -> None:
    hint = "move it away or choose another --workspace; it is not touched"
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        kind = "link" if folder.is_symlink() else "file"
        raise NvlmError(f"{folder} is a {kind}, where a folder is to be put in place", hint=hint)
    if folder.is_dir() and not (folder / MANIFEST_NAME).is_file() and any(folder.iterdir()):
        raise NvlmError(f"{folder} exists and was not made by nvlm (no {MANIFEST_NAME})", hint=hint)


@dataclass(frozen=True)
class Pipeline:
    """Steps in order; each may read what those before it made. `make_step` is late: inputs must exist by then.

    `profile` is written into every manifest, as the choices that were in force.
    """

    lock: Path
    makers: Mapping[str, Callable[[], Step]]
    profile: Mapping[str, Any] | None = None

    def run(self, *, force: bool = False) -> Iterator[tuple[Step, State]]:
        """Yield each step with what happened; a killed run goes on at the step it was in.

        Raises MachineError when the disk is full, whatever was to be written.
        """
        with disk_errors(self.lock.parent), _opened(self.lock) as lock, _exclusive(lock):
            for make_step in self.makers.values():
                step = make_step()
                yield step, run_step(step, force=force, profile=self.profile)[0]

    def plan(self, *, force: bool = False) -> Iterator[tuple[str, State]]:
        """What `run` would do, writing nothing. After one step to build, so are all that follow."""
        stale = force
        for name, make_step in self.makers.items():
            stale = stale or state_of(make_step()) is State.TO_BUILD
            yield name, State.TO_BUILD if stale else State.UP_TO_DATE


def _opened(lock: Path) -> TextIO:
    """The first file of a build. Raises MachineError where nothing can be written at all."""
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        return lock.open("a+")
    except OSError as problem:
        if problem.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise MachineError(
            f"{lock.parent} cannot be written to: {problem.strerror}",
            hint="choose another: --workspace FOLDER",
        ) from problem


@contextlib.contextmanager
def _exclusive(lock: TextIO) -> Iterator[None]:
    """One build at a time per workspace; the kernel releases the lock of a killed build."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise MachineError(
            f"another build is running in {Path(lock.name).parent}", hint="wait for it, or choose another --workspace"
        ) from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    yield
