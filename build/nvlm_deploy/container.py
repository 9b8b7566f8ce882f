"""Commands for a container: which image, what of this machine is mounted where, and how paths read inside it.

Nothing is run or looked for. A path of this machine appears on the left side of a mount and nowhere else.
"""

from __future__ import annotations

import csv
import io
import os
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath

# NCCL between ranks, and tensors between Triton and its Python models, go through shared memory
_SHM_SIZE = "8g"
_SOURCE_INSIDE = PurePosixPath("/nvlm-deploy")


@dataclass(frozen=True)
class Mount:
    """A file or folder of this machine, by its absolute path, and where it is inside."""

    host: Path
    inside: PurePosixPath
    is_writable: bool = False

    @property
    def words(self) -> tuple[str, str]:
        """The option of `docker run`; -v knows no path with a colon."""
        if ":" not in str(self.host):
            return "-v", f"{self.host}:{self.inside}" + ("" if self.is_writable else ":ro")
        fields = ["type=bind", f"source={self.host}", f"target={self.inside}"]
        return "--mount", _comma_separated(fields if self.is_writable else [*fields, "readonly"])


def _comma_separated(fields: Iterable[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(fields)
    return text.getvalue()


def folder_mount(folder: Path, inside: str, files: Iterable[Path] = (), *, is_writable: bool = False) -> Mount:
    """Return the mount of a folder.

    Where its files are links that lead out of it, as in a download cache, more is mounted: the nearest folder that
    holds their targets too.
    """
    host = absolute(folder)
    targets = {os.path.realpath(path) for path in files if path.is_symlink()}
    real = os.path.realpath(host)
    common = os.path.commonpath([real, *targets])
    if common in (real, os.path.sep):
        return Mount(host, PurePosixPath(inside), is_writable)
    return Mount(Path(common), PurePosixPath(inside), is_writable)


def absolute(path: Path) -> Path:
    """Return a path without `..` and not relative to the folder one stands in; links stay as they are."""
    return Path(os.path.abspath(path))  # noqa: PTH100  # Path.absolute keeps `..`


@dataclass(frozen=True)
class Container:
    """An image and what is mounted in it."""

    image: str
    mounts: tuple[Mount, ...]

    def inside(self, path: Path) -> PurePosixPath:
        """Return how a path of this machine reads inside: by the nearest mount that holds it."""
        for place in (absolute(path), Path(os.path.realpath(path))):
            holding = [mount for mount in self.mounts if place.is_relative_to(mount.host)]
            if holding:
                nearest = max(holding, key=lambda mount: (len(mount.host.parts), mount.is_writable))
                return nearest.inside / place.relative_to(nearest.host).as_posix()
        raise ValueError(f"{path} is in no mount")

    def start(self, *, host_network: bool = False) -> str:
        """Return the command that opens a shell in it, with all GPUs."""
        words = ["docker", "run", "--rm", "-it", "--gpus", "all", "--shm-size", _SHM_SIZE, "--ulimit", "memlock=-1"]
        words += ["--network", "host"] if host_network else []
        words += [word for mount in self.mounts for word in mount.words]
        return shlex.join([*words, self.image, "bash"])


@dataclass(frozen=True)
class Package:
    """This package, as a container gets it: from the checkout that it runs from, else from the package index."""

    checkout: Path | None

    @classmethod
    def here(cls) -> Package:
        root = Path(__file__).resolve().parents[2]
        return cls(root if (root / "pyproject.toml").is_file() else None)

    @property
    def mounts(self) -> tuple[Mount, ...]:
        return () if self.checkout is None else (Mount(self.checkout, _SOURCE_INSIDE),)

    def mounts_for(self, program: Path) -> tuple[Mount, ...]:
        """Return the mounts by which a file of this package is inside."""
        if self.checkout is not None and program.is_relative_to(self.checkout):
            return self.mounts
        return (*self.mounts, Mount(program, _SOURCE_INSIDE / program.name))

    def install(self, *others: str) -> str:
        """Return the command that installs it inside; the container's own torch and TensorRT are left alone."""
        version = metadata.version("nvlm-deploy")
        what = f"nvlm-deploy=={version}" if self.checkout is None else str(_SOURCE_INSIDE)
        return shlex.join(["python3", "-m", "pip", "install", what, *others])
