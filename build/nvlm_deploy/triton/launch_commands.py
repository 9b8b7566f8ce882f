"""The commands that serve a repository, to paste: the bundled server's here, or the container's for engines.

Nothing is started, written or asked of a GPU. They do what `nvlm serve` does, without its look at every byte.
"""

from __future__ import annotations

import os
import shlex
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvlm_deploy.container import Container, Package, absolute, folder_mount
from nvlm_deploy.errors import MachineError
from nvlm_deploy.llm.engine_tool import CONTAINER_IMAGE
from nvlm_deploy.manifest import sha256_of_json
from nvlm_deploy.triton.decoder import DECODER, VERSION
from nvlm_deploy.triton.engine_fit import ENGINES, EngineFacts
from nvlm_deploy.triton.engine_launch import CONTAINERS_SERVER, engine_command
from nvlm_deploy.triton.installation import (
    Installation,
    backend_files,
    find_installation,
    package_parts,
    server_environment,
)
from nvlm_deploy.triton.server import ServerChoices, server_arguments, server_command

# in the container's own /dev/shm. No digits first: `nvlm serve` would take it for what a dead process left
_MEMORY_NAME = "nvlm_pasted_"
_ENVIRONMENT = (
    "LD_LIBRARY_PATH",
    "PATH",
    "VIRTUAL_ENV",
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "TOKENIZERS_PARALLELISM",
)


@dataclass(frozen=True)
class LaunchCommands:
    """Lines to paste one after the other; `image` and `start` where a container is to be entered first."""

    lines: tuple[str, ...]
    start: str | None = None
    image: str | None = None
    remark: str = ""

    def as_json(self) -> dict[str, Any]:
        container = {} if self.start is None else {"container": {"image": self.image, "start": self.start}}
        return {**container, "commands": list(self.lines)}


def launch_commands(repository: Path, choices: ServerChoices, *, image: str = CONTAINER_IMAGE) -> LaunchCommands:
    """Return what serves a repository: in the container where it holds TensorRT-LLM's engines, else here."""
    folder = absolute(repository)
    if any((folder / DECODER / VERSION).glob(ENGINES)):
        return _of_container(folder, choices, image)
    try:
        return LaunchCommands(_bundled(folder, choices, find_installation()), remark="the bundled tritonserver")
    except MachineError as problem:
        ports = choices.ports
        words = ["nvlm", "serve", str(folder), "--host", ports.host, "--grpc-port", str(ports.grpc)]
        words += ["--http-port", str(ports.http), "--metrics-port", str(ports.metrics)]
        install = shlex.join(["python3", "-m", "pip", "install", "nvlm-deploy[serve]"])
        return LaunchCommands((install, shlex.join(words)), remark=f"the bundled tritonserver; here {problem.message}")


def _of_container(folder: Path, choices: ServerChoices, image: str) -> LaunchCommands:
    package = Package.here()
    mount = folder_mount(folder, "/repository", folder.rglob("*"))
    container = Container(image, (*package.mounts, mount))
    inside = Path(container.inside(folder))
    facts = EngineFacts.read(folder / DECODER / VERSION)
    command = engine_command(server_arguments(CONTAINERS_SERVER, inside, choices), facts, memory_name=_MEMORY_NAME)
    lines = (package.install(), shlex.join(["cd", str(inside)]), shlex.join(command))
    remark = f"the container's tritonserver, TensorRT-LLM {facts.version}, {facts.world_size} rank(s)"
    return LaunchCommands(lines, container.start(host_network=True), image, remark)


def _bundled(folder: Path, choices: ServerChoices, installation: Installation) -> tuple[str, ...]:
    """As `TritonServer` does it: a backend folder of links, and a link to the repository with a plain path."""
    scratch = Path(tempfile.gettempdir()) / f"nvlm-serve-{sha256_of_json(os.fsencode(folder).hex())[:12]}"
    backend, link = scratch / "backends" / "python", scratch / "repository"
    command = server_command(installation, link, scratch / "backends", choices)
    command.append(f"--backend-config=python,shm-region-prefix-name={_MEMORY_NAME}")
    environment = server_environment(installation, threads=choices.threads)
    values = [f"{name}={environment[name]}" for name in _ENVIRONMENT if name in environment]
    lines = [
        ["mkdir", "-p", str(backend / "nvlm_deploy")],
        ["ln", "-sfn", *map(str, backend_files(installation)), f"{backend}/"],
        ["ln", "-sfn", *map(str, package_parts().values()), f"{backend / 'nvlm_deploy'}/"],
        ["ln", "-sfn", str(folder), str(link)],
        ["env", *values, *command],
    ]
    return tuple(shlex.join(words) for words in lines)
