"""trtllm-build in this machine: where it is, whose Python runs it, and whether its TensorRT-LLM is one we know."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from nvlm_deploy.errors import MachineError

EXECUTABLE = "trtllm-build"
_VERSION_PROGRAM = "from importlib.metadata import version; print(version('tensorrt_llm'))"


@dataclass(frozen=True)
class Release:
    """TensorRT-LLM as Triton's `-trtllm-python-py3` containers carry it (contract 0)."""

    name: str
    pattern: str
    tensorrt: str
    containers: tuple[str, ...]


RELEASES = (
    Release("1.2.1", r"1\.2\.1", "10.14.", ("26.04", "26.05", "26.06", "26.07")),
    Release("1.2.0", r"1\.2\.0", "10.14.", ("26.03",)),
    Release("1.1.x", r"1\.1\.[0-9]+", "10.13.", ("25.12", "26.01", "26.02")),
    Release("1.0.x", r"1\.0\.[0-9]+", "10.11.", ("25.09", "25.10")),
)
# what commands are written for where no TensorRT-LLM is installed
NEWEST = RELEASES[0]
# by the name and tag that its makers give it; the registry is the user's
CONTAINER_IMAGE = f"tritonserver:{NEWEST.containers[-1]}-trtllm-python-py3"
CONTAINERS_HINT = "the Triton containers whose tag ends in -trtllm-python-py3 have it: " + "; ".join(
    f"{', '.join(release.containers)} ({release.name})" for release in RELEASES
)


@dataclass(frozen=True)
class BuildTool:
    """An installed trtllm-build; `interpreter` is the Python that can import its tensorrt_llm."""

    executable: str
    interpreter: str
    version: str


def installed_tool() -> BuildTool:
    """The trtllm-build on PATH. Raises MachineError where there is none, or one whose engines we do not know."""
    tool = found_tool()
    release_of(tool.version)
    return tool


def found_tool() -> BuildTool:
    """The trtllm-build on PATH, of whatever version. Raises MachineError where there is none."""
    executable = shutil.which(EXECUTABLE)
    if executable is None:
        raise MachineError(f"no {EXECUTABLE} on PATH", hint=CONTAINERS_HINT)
    interpreter = interpreter_of(Path(executable))
    return BuildTool(executable, interpreter, _version(executable, interpreter))


def release_of(version: str) -> Release:
    """Raises MachineError, naming the version and the containers that have a right one."""
    for release in RELEASES:
        if re.fullmatch(release.pattern, version):
            return release
    known = ", ".join(release.name for release in reversed(RELEASES))
    raise MachineError(
        f"TensorRT-LLM {version} is installed; engines are built with {known}, the last that have {EXECUTABLE}",
        hint=CONTAINERS_HINT,
    )


def interpreter_of(script: Path) -> str:
    """The Python in a console script's first line: it, and maybe no other, can import what the script imports."""
    with script.open("rb") as file:
        first = file.readline(500).decode("utf-8", errors="replace").strip()
    words = first.removeprefix("#!").split() if first.startswith("#!") else []
    words = words[1:] if words and Path(words[0]).name == "env" else words
    # pip writes #!/bin/sh where the path is too long for a first line
    named = words[0] if words and "python" in Path(words[0]).name else "python3"
    found = shutil.which(named)
    if found is None:
        raise MachineError(f"{script} wants the Python {named!r}, which is not here", hint=CONTAINERS_HINT)
    return found


def _version(executable: str, interpreter: str) -> str:
    # the distribution's own word: importing the package takes half a minute and a GPU
    done = subprocess.run([interpreter, "-P", "-c", _VERSION_PROGRAM], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise MachineError(
            f"{executable} is here, but {interpreter} has no tensorrt_llm: {reason}", hint=CONTAINERS_HINT
        )
    return done.stdout.strip()
