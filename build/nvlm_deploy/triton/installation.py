"""Where the tritonserver of the nvidia-pytriton wheel lies, and what its process needs around it.

All of it was found by trying (facts/running-on-a-cpu.md): the wheel's bundled libraries and the shared libpython on
LD_LIBRARY_PATH, and a backend folder with the stub of this Python's version beside libtriton_python.so.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from dataclasses import dataclass
from importlib import import_module, metadata, util
from pathlib import Path

from nvlm_deploy.errors import MachineError
from nvlm_deploy.triton.repository import link_or_copy


@dataclass(frozen=True)
class Installation:
    """Where the wheel's parts and the shared libpython are."""

    server: Path
    python_backend: Path
    stub: Path
    caches: Path
    library_folders: tuple[Path, ...]


def find_installation() -> Installation:
    """The bundled server. Raises MachineError naming the part that is missing and how to get it."""
    package = util.find_spec("pytriton")
    if package is None or not package.submodule_search_locations:
        raise MachineError("nvidia-pytriton is not installed", hint="pip install 'nvlm-deploy[serve]'")
    root = Path(package.submodule_search_locations[0]) / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    installation = Installation(
        server=root / "bin" / "tritonserver",
        python_backend=root / "backends" / "python",
        stub=root / "python_backend_stubs" / version / "triton_python_backend_stub",
        caches=root / "caches",
        library_folders=(libpython_folder(version), root.parents[1] / "nvidia_pytriton.libs"),
    )
    for part in (installation.server, installation.python_backend, installation.stub, *installation.library_folders):
        if not part.exists():
            raise MachineError(
                f"nvidia-pytriton has no {part.name} for Python {version}", hint="use Python 3.11 or 3.12"
            )
    _require_old_numpy()
    return installation


def libpython_folder(version: str) -> Path:
    """The folder of the shared libpython that the stub links to; MachineError says which package has it."""
    name = f"libpython{version}.so.1.0"
    candidates = [
        sysconfig.get_config_var("LIBDIR"),
        Path(sys.base_prefix) / "lib",
        f"/usr/lib/{sysconfig.get_config_var('MULTIARCH')}",
        "/usr/lib64",
    ]
    for candidate in candidates:
        if candidate and (Path(candidate) / name).exists():
            return Path(candidate)
    raise MachineError(f"no {name} found: Triton's python stub needs it", hint=f"apt-get install libpython{version}")


def _require_old_numpy() -> None:
    """The stub's pybind11 reads numpy 2's arrays wrong: every string tensor would crash it."""
    version = metadata.version("numpy")
    if int(version.split(".")[0]) >= 2:
        raise MachineError(
            f"numpy {version} crashes Triton's python stub",
            hint="pip install 'numpy<2', which has wheels for Python 3.11 and 3.12",
        )


def prepare_backend(installation: Installation, folder: Path) -> None:
    """A backend directory with the stub of this Python's version beside the backend's library.

    The stub runs an isolated interpreter, which knows the virtual environment but no PYTHONPATH. The backend's
    folder is on its import path, so this very package is linked there.
    """
    backend = folder / "python"
    package = backend / "nvlm_deploy"
    package.mkdir(parents=True)
    for part in backend_files(installation):
        link_or_copy(part, backend / part.name)
    for name, part in package_parts().items():
        (package / name).symlink_to(part)


def backend_files(installation: Installation) -> list[Path]:
    """Return the files of the python backend, and the stub of this Python's version."""
    return [part for part in (*sorted(installation.python_backend.iterdir()), installation.stub) if part.is_file()]


def package_parts() -> dict[str, Path]:
    """The rooms by name. Where two clones are on the path, each is of the first that has it, as for Python's import."""
    roots = [Path(root).resolve() for root in import_module("nvlm_deploy").__path__]
    return {part.name: part for root in reversed(roots) for part in root.glob("[a-z]*")}


def server_environment(installation: Installation, *, threads: int) -> dict[str, str]:
    """This process's environment with what the server needs; few threads, as its stubs share the cores."""
    environment = dict(os.environ)
    libraries = [*(str(folder) for folder in installation.library_folders), environment.get("LD_LIBRARY_PATH", "")]
    environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, libraries))
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    if sys.prefix != sys.base_prefix:
        environment["VIRTUAL_ENV"] = sys.prefix
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        environment[variable] = str(threads)
    environment["TOKENIZERS_PARALLELISM"] = "false"
    return environment
