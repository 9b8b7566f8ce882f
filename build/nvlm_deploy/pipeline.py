"""Step and Pipeline: the order of a build, the up-to-date test, dry run, resume."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from nvlm_deploy.artifacts import (
    MANIFEST_NAME,
    Artifact,
    Manifest,
    clear_partial,
    digests,
    read_manifest,
    replace_folder,
    resumable_folder,
    sha256_of,
    sha256_of_json,
    tool_versions,
    verify,
    write_manifest,
)
from nvlm_deploy.errors import MachineError, NvlmError

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
    A step that `resumes` finds in its folder what a killed run of the same key wrote.
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

    @cached_property
    def input_digests(self) -> dict[str, str]:
        return {name: digest_of_input(path) for name, path in self.inputs.items()}

    @property
    def key(self) -> str:
        return sha256_of_json([self.name, self.revision, self.input_digests, dict(self.settings)])


def digest_of_input(path: Path) -> str:
    """A file's SHA-256; a finished artifact's, by its manifest; any other folder's, over its files."""
    if not path.exists():
        raise NvlmError(f"no input {path}", hint="run the steps before this one: `nvlm build` runs all")
    if path.is_file():
        state = path.stat()
        return _file_digest(path, state.st_ino, state.st_size, state.st_mtime_ns)
    if (path / MANIFEST_NAME).is_file():
        return sha256_of_json(dict(read_manifest(path).outputs))
    return sha256_of_json(digests(path))


@lru_cache(maxsize=4096)
def _file_digest(path: Path, *_state: int) -> str:
    """Several steps read the same shards: one pass over each while it stays as it is."""
    return sha256_of(path)


def state_of(step: Step) -> State:
    """Up to date when the artifact's key is this step's and its files are what its manifest says."""
    if not step.output.exists():
        return State.TO_BUILD
    try:
        artifact = verify(step.output)
    except NvlmError as problem:
        log.warning("%s: %s", step.name, problem.message)
        return State.TO_BUILD
    return State.UP_TO_DATE if artifact.manifest.key == step.key else State.TO_BUILD


def run_step(step: Step, *, force: bool = False) -> tuple[State, Artifact]:
    """Build a step's artifact unless it is up to date.

    An existing folder without a manifest is not ours and is refused, never overwritten.
    """
    clear_partial(step.output, keep=step.key if step.resumes else None)
    _require_ours(step.output)
    if not force and state_of(step) is State.UP_TO_DATE:
        log.info("%s: up to date", step.name)
        return State.UP_TO_DATE, Artifact(step.output, read_manifest(step.output))
    log.info("%s: building %s", step.name, step.output)
    with resumable_folder(step.output, step.key) if step.resumes else replace_folder(step.output) as folder:
        notes = step.make(folder)
        write_manifest(folder, _manifest(step, digests(folder), notes))
    return State.BUILT, Artifact(step.output, read_manifest(step.output))


def _manifest(step: Step, outputs: Mapping[str, str], notes: Mapping[str, Any]) -> Manifest:
    return Manifest(
        kind=step.name,
        key=step.key,
        inputs=step.input_digests,
        settings=step.settings,
        outputs=outputs,
        evidence=step.evidence,
        tools=tool_versions(step.tools),
        notes=notes,
    )


def _require_ours(folder: Path) -> None:
    if folder.is_dir() and not (folder / MANIFEST_NAME).is_file() and any(folder.iterdir()):
        raise NvlmError(
            f"{folder} exists and was not made by nvlm (no {MANIFEST_NAME})",
            hint="move it away or choose another --workspace; it is not touched",
        )


@dataclass(frozen=True)
class Pipeline:
    """Steps in order; each may read what those before it made. `make_step` is late: inputs must exist by then."""

    lock: Path
    makers: Mapping[str, Callable[[], Step]]

    def run(self, *, force: bool = False) -> Iterator[tuple[Step, State]]:
        """Yield each step with what happened; a killed run goes on at the step it was in."""
        with _exclusive(self.lock):
            for make_step in self.makers.values():
                step = make_step()
                yield step, run_step(step, force=force)[0]

    def plan(self, *, force: bool = False) -> Iterator[tuple[str, State]]:
        """What `run` would do, writing nothing. After one step to build, so are all that follow."""
        stale = force
        for name, make_step in self.makers.items():
            stale = stale or state_of(make_step()) is State.TO_BUILD
            yield name, State.TO_BUILD if stale else State.UP_TO_DATE


@contextlib.contextmanager
def _exclusive(lock: Path) -> Iterator[None]:
    """One build at a time per workspace; the kernel releases the lock of a killed build."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MachineError(
                f"another build is running in {lock.parent}", hint="wait for it, or choose another --workspace"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
