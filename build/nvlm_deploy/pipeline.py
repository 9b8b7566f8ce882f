"""Step and Pipeline: the order of a build, the up-to-date test, dry run, resume."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from nvlm_deploy.artifacts import (
    BEGUN_NOTE_NAME,
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
    write_text,
)
from nvlm_deploy.build_lock import build_lock
from nvlm_deploy.digest import KNOWN_DIGESTS
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.fingerprint import Fingerprint, cohort_versions
from nvlm_deploy.manifest import MANIFEST_NAME, CalibrationList, Manifest, read_manifest, sha256_of_json
from nvlm_deploy.slots import bring_to_place, key_of, slot_for, slots_of, with_key
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
    output is made, which machine it runs on; None when on any. A finished output of other inputs or choices is set
    aside in a slot (slots.py), unless making it is mere copying (`is_cheap`): then it is replaced.
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
    is_cheap: bool = False
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
    """Return whether this step's very content is finished and whole, at its output or in a slot."""
    return State.TO_BUILD if finished_folder(step) is None else State.UP_TO_DATE


def finished_folder(step: Step) -> Path | None:
    """Return the whole artifact of this step's very content, at its output or in a slot; None where there is none."""
    if not step.output.exists() and not slots_of(step.output):
        return None  # the inputs, 150 GB of them perhaps, need no look
    if step.output.exists() and key_of(step.output) is None:
        log.warning("%s: the manifest of %s is missing or damaged", step.name, step.output)
    for folder in with_key(step.output, step.key):
        try:
            return _verified(folder).folder
        except NvlmError as problem:
            log.warning("%s: %s", step.name, problem.message)
    return None


def required_folder(step: Step) -> Path:
    """Return the artifact of this step's very content, at its output or in a slot.

    Raises NvlmError where it is missing, damaged, or made of other inputs or with other choices.
    """
    hint = f"`nvlm {step.name}` with this checkpoint and profile, or `nvlm build` for all steps"
    for folder in with_key(step.output, step.key):
        return _verified(folder).folder
    if not step.output.exists():
        raise NvlmError(f"no {step.output}", hint=hint)
    differing = ", ".join(differences(read_manifest(step.output), step)) or "another version of this tool made it"
    raise NvlmError(f"{step.output} is not what would be made now: {differing}", hint=hint)


def require_finished(makers: Mapping[str, Callable[[], Step]]) -> None:
    """Raise NvlmError for the first step whose artifact is not there as it would be made now; changes nothing."""
    found: dict[Path, Path] = {}
    for make_step in makers.values():
        step = _reading(make_step(), found)
        found[step.output] = required_folder(step)


def _reading(step: Step, found: Mapping[Path, Path]) -> Step:
    """Return the step with its inputs where they lie now: a slot is not at its place before the step is run."""
    return replace(step, inputs={name: found.get(path, path) for name, path in step.inputs.items()})


def differences(made: Manifest, now: Step | Manifest) -> Iterator[str]:
    """Yield each choice and input in which an artifact differs from a step, or from another artifact."""
    then, here = dict(made.settings), dict(now.settings)
    inputs = now.input_digests if isinstance(now, Step) else now.inputs
    for name in sorted(then.keys() | here.keys()):
        if then.get(name) != here.get(name):
            yield f"{name} was {then.get(name)!r}, is {here.get(name)!r}"
    for name in sorted(made.inputs.keys() | inputs.keys()):
        if made.inputs.get(name) != inputs.get(name):
            yield f"input {name} differs"


def run_step(step: Step, *, force: bool = False, profile: Mapping[str, Any] | None = None) -> tuple[State, Artifact]:
    """Build a step's artifact unless it is up to date, or lies in a slot: then it is brought back to its place.

    What is replaced at the output goes to a slot of its own, unless it has the same key or is cheap. An existing folder
    without a manifest is not ours and is refused, never overwritten.
    """
    key = step.key  # looks at all inputs: nothing is begun with one that is missing or damaged
    clear_partial(step.output)
    _require_ours(step.output)
    found = finished_folder(step)
    if found is not None:
        bring_to_place(found, step.output)
        if not force:
            log.info("%s: up to date", step.name)
            return State.UP_TO_DATE, Artifact(step.output, read_manifest(step.output))
    log.info("%s: building %s", step.name, step.output)
    replaces = step.is_cheap or key_of(step.output) == key
    kept = None if replaces else slot_for(step.output)
    filling = resumable_folder(step.output, key, kept=kept) if step.resumes else replace_folder(step.output, kept=kept)
    with filling as folder:
        if not _is_finished(folder, key):
            if step.resumes:
                _write_begun_note(folder, step)
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
    return {name: sha256 for name, sha256 in found.items() if name not in (JOURNAL_NAME, BEGUN_NOTE_NAME)}


def _write_begun_note(folder: Path, step: Step) -> None:
    """Say in an unfinished folder what it is made of: `nvlm artifacts list` shows it."""
    lists = [one.folder for one in _calibration_lists(step)]
    note = {"kind": step.name, "key": step.key, "settings": step.settings, "lists": lists}
    write_text(folder / BEGUN_NOTE_NAME, json.dumps(note | {"inputs": step.input_digests}) + "\n")


def _manifest(
    step: Step, outputs: Mapping[str, str], notes: Mapping[str, Any], profile: Mapping[str, Any] | None
) -> Manifest:
    """With what its inputs are bound to and were calibrated with: a repository says it for all that is in it."""
    before = _manifests_of_inputs(step)
    bound_to = step.bound_to() if step.bound_to else None
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
        calibration=_calibration_lists(step),
        fingerprints=fingerprints | ({step.name: bound_to.as_json()} if bound_to else {}),
    )


def _manifests_of_inputs(step: Step) -> list[Manifest]:
    return [read_manifest(path) for path in step.inputs.values() if (path / MANIFEST_NAME).is_file()]


def _calibration_lists(step: Step) -> list[CalibrationList]:
    """Return the step's own calibration list, and those of the artifacts that it reads."""
    lists = calibration_of(step.inputs, step.input_digests)
    for one in (one for manifest in _manifests_of_inputs(step) for one in manifest.calibration):
        lists += [] if one in lists else [one]
    return lists


def _require_ours(folder: Path) -> None:
    hint = "move it away or choose another --workspace; it is not touched"
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        kind = "link" if folder.is_symlink() else "file"
        raise NvlmError(f"{folder} is a {kind}, where a folder is to be put in place", hint=hint)
    if folder.is_dir() and not (folder / MANIFEST_NAME).is_file() and any(folder.iterdir()):
        raise NvlmError(f"{folder} exists and was not made by nvlm (no {MANIFEST_NAME})", hint=hint)


@dataclass(frozen=True)
class Planned:
    """A step that a dry run has looked at; `found` is its finished artifact, which may lie in a slot."""

    step: Step
    found: Path | None

    @property
    def state(self) -> State:
        return State.TO_BUILD if self.found is None else State.UP_TO_DATE


@dataclass(frozen=True)
class Pipeline:
    """Steps in order; each may read what those before it made. `make_step` is late: inputs must exist by then.

    `before` are steps that are not run: what they made must be there, and is brought to its place. `profile` is written
    into every manifest, as the choices that were in force.
    """

    lock: Path
    makers: Mapping[str, Callable[[], Step]]
    profile: Mapping[str, Any] | None = None
    before: Mapping[str, Callable[[], Step]] = field(default_factory=dict)

    def run(self, *, force: bool = False) -> Iterator[tuple[Step, State]]:
        """Yield each step with what happened; a killed run goes on at the step it was in.

        Raises MachineError when the disk is full, whatever was to be written.
        """
        with disk_errors(self.lock.parent), build_lock(self.lock):
            for make_step in self.before.values():
                step = make_step()
                bring_to_place(required_folder(step), step.output)
            for make_step in self.makers.values():
                step = make_step()
                yield step, run_step(step, force=force, profile=self.profile)[0]

    def planned(self, *, force: bool = False) -> Iterator[Planned]:
        """Yield each step with what `run` would find, writing nothing. What reads a step to build is to build too."""
        found: dict[Path, Path] = {}
        stale: set[Path] = set()
        for make_step in self.before.values():
            with contextlib.suppress(NvlmError):  # what is missing is not asked for by a dry run
                step = _reading(make_step(), found)
                found[step.output] = required_folder(step)
        for make_step in self.makers.values():
            step = _reading(make_step(), found)
            must = force or not stale.isdisjoint(step.inputs.values()) or not _all_exist(step.inputs.values())
            folder = None if must else finished_folder(step)
            if folder is None:
                stale.add(step.output)
            else:
                found[step.output] = folder
            yield Planned(step, folder)

    def plan(self, *, force: bool = False) -> Iterator[tuple[str, State]]:
        """Yield the name and state of each step, as `planned` finds them."""
        return ((planned.step.name, planned.state) for planned in self.planned(force=force))


def _all_exist(paths: Iterable[Path]) -> bool:
    return all(path.exists() for path in paths)
