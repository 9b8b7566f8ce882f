"""The host: its server, the libraries that it needs, ports, shared memory, memory and disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from nvlm_deploy.doctor.needs import Needs
from nvlm_deploy.doctor.shared_memory import REGION_BYTES, description, largest_request, what_fits
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.llm.engine_tool import CONTAINERS_HINT, EXECUTABLE, found_tool, release_of
from nvlm_deploy.llm.preflight import Finding
from nvlm_deploy.machine.host import free_bytes, glibc_version, glibc_wanted_by, python_version, require_writable
from nvlm_deploy.machine.resources import available_memory
from nvlm_deploy.triton.installation import find_installation, libpython_folder
from nvlm_deploy.triton.server import SHARED_MEMORY, Ports

GIB, MIB = 2**30, 2**20
PYTHONS = ("3.11", "3.12")
SERVER_WHEEL = "nvidia-pytriton"
# what a runtime is made of, and the extra of this package that brings it; None where no package index has it
_DISTRIBUTIONS = {
    "onnxruntime": (("onnxruntime",), "serve"),
    "reference": (("torch",), "serve"),
    "tensorrt": (("tensorrt",), None),
    "tensorrt_llm": (("tensorrt_llm",), None),
    "tensorrt_rtx": (("tensorrt_rtx", "tensorrt_rtx_cu13_libs", "tensorrt_rtx_cu12_libs"), "test"),
}
_WITHOUT_REQUESTS = 4 * REGION_BYTES


@dataclass(frozen=True)
class Place:
    """Where one builds and listens."""

    workspace: Path
    ports: Ports


def host_findings(needs: Needs | None, place: Place) -> Iterator[Finding]:
    yield _python()
    if needs is not None and needs.in_container:
        yield _container_server()
    else:
        yield _libpython()
        yield _glibc()
        yield _bundled_server()
    for runtime in sorted(needs.runtimes) if needs else ():
        yield _runtime(runtime)
    if needs is not None and needs.in_container:
        yield _cohort()
    yield _ports(place.ports)
    yield _shared_memory(needs)
    yield _memory(needs)
    yield _disk(needs, place.workspace)


def _asked(check: str, question: Callable[[], str]) -> Finding:
    """What the part itself says, with its own fix where it refuses."""
    try:
        return Finding(check, True, question())
    except NvlmError as problem:
        return Finding(check, False, problem.message, problem.hint)


def _python() -> Finding:
    version = python_version()
    fix = f"use Python {' or '.join(PYTHONS)}: the bundled server needs numpy 1.26, which has no wheel for later ones"
    return Finding("Python", version in PYTHONS, version, None if version in PYTHONS else fix)


def _libpython() -> Finding:
    return _asked("libpython", lambda: f"in {libpython_folder(python_version())}")


def _glibc() -> Finding:
    here, wanted = glibc_version(), glibc_wanted_by(SERVER_WHEEL)
    if here is None:
        return Finding("glibc", False, "another C library is here", "use a Linux with glibc: tritonserver links to it")
    found = f"{here[0]}.{here[1]}"
    if wanted is None:
        return Finding("glibc", True, found)
    right, least = here >= wanted, f"{wanted[0]}.{wanted[1]}"
    fix = f"use a system with glibc {least} or newer, as Ubuntu 22.04 or Debian 12"
    return Finding("glibc", right, f"{found}, the bundled tritonserver needs {least}", None if right else fix)


def _bundled_server() -> Finding:
    def found() -> str:
        server = find_installation().server
        return (
            f"{SERVER_WHEEL} {metadata.version(SERVER_WHEEL)}, {server.name} with the stub of Python {python_version()}"
        )

    return _asked("tritonserver", found)


def _container_server() -> Finding:
    executable = shutil.which("tritonserver")
    if executable is None:
        return Finding("tritonserver", False, "none on PATH: this is no Triton container", CONTAINERS_HINT)
    return Finding("tritonserver", True, executable)


def _runtime(runtime: str) -> Finding:
    names, extra = _DISTRIBUTIONS[runtime]
    for name in names:
        try:
            return Finding(runtime, True, f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    fix = CONTAINERS_HINT if extra is None else f"pip install 'nvlm-deploy[{extra}]'"
    return Finding(runtime, False, f"no {names[0]} is installed here", fix)


def _cohort() -> Finding:
    def found() -> str:
        tool = found_tool()
        release = release_of(tool.version)
        return f"TensorRT-LLM {tool.version} with {EXECUTABLE}, of containers {', '.join(release.containers)}"

    return _asked("cohort", found)


def _ports(ports: Ports) -> Finding:
    def found() -> str:
        ports.require_free()
        return f"{ports.grpc} (gRPC), {ports.http} (HTTP), {ports.metrics} (metrics) are free on {ports.host}"

    return _asked("ports", found)


def _shared_memory(needs: Needs | None) -> Finding:
    """Docker gives a container 64 MiB where nobody asks for more."""
    if not SHARED_MEMORY.is_dir():
        return Finding("shared memory", False, f"no {SHARED_MEMORY}", "mount -t tmpfs tmpfs /dev/shm")
    free = free_bytes(SHARED_MEMORY)
    found, wanted = f"{_size(free)} free in {SHARED_MEMORY}", _WITHOUT_REQUESTS
    if needs is not None:
        wanted = largest_request(needs).under_load_bytes
        found += f"; {description(needs)}: {what_fits(needs, free)}"
    size = f"{max(1, -(-wanted // GIB))}g"
    fix = f"in a container `docker run --shm-size={size}`; on a host `mount -o remount,size={size} {SHARED_MEMORY}`"
    return Finding("shared memory", free >= wanted, found, None if free >= wanted else fix)


def _memory(needs: Needs | None) -> Finding:
    """What the hungriest step of a build takes; where there is no GPU, also the model itself."""
    free = available_memory()
    if needs is None or needs.spec is None:
        return Finding("host memory", True, f"{_size(free)} free")
    found, step = f"{_size(free)} free", needs.hungriest
    if not needs.has_gpu:
        from nvlm_deploy.planning.memory import memory_account, room_of

        account = memory_account(needs.spec, needs.profile, room_of(needs.sku, free))
        if not account.fits:
            fix = "take a machine with more memory, or a profile with a smaller max_seq_len or FP8 weights"
            return Finding("host memory", False, f"{account.why_not} (derived)", fix)
        found += f", {_size(account.needed_bytes(account.tightest))} needed to serve"
    if step is None:
        return Finding("host memory", True, found)
    found += f", {_size(step.host_bytes)} needed to build ({step.name}, {step.host_evidence})"
    fix = f"give this machine more memory, or build on a larger one of its kind: `nvlm {step.name}` is that step alone"
    return Finding("host memory", free >= step.host_bytes, found, None if free >= step.host_bytes else fix)


def _disk(needs: Needs | None, workspace: Path) -> Finding:
    wanted = needs.disk_bytes if needs else 0
    try:
        require_writable(workspace)
        free = free_bytes(workspace)
    except OSError as problem:
        found = f"{workspace} cannot be written to: {problem.strerror}"
        return Finding("disk", False, found, "let this user write there, or choose another: `--workspace FOLDER`")
    found = f"{_size(free)} free for {workspace}" + (f", {_size(wanted)} needed to build (derived)" if wanted else "")
    fix = "free space (`df -h`), or choose another disk: `--workspace FOLDER`"
    return Finding("disk", free >= wanted, found, None if free >= wanted else fix)


def _size(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.1f} GiB" if size_bytes >= GIB else f"{size_bytes / MIB:.0f} MiB"
