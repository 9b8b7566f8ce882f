"""What a program finds in this machine: host memory that is free, and the GPUs that the CUDA driver shows to it."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# CUdevice_attribute of the CUDA driver API
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76


@dataclass(frozen=True)
class Gpu:
    """`device` is what CUDA_VISIBLE_DEVICES must say for a child to see this GPU alone."""

    name: str
    compute_capability: str
    device: str


@dataclass(frozen=True)
class Machine:
    """Host memory that programs may still take, and the GPUs that this process may use."""

    available_bytes: int
    gpus: tuple[Gpu, ...]


def this_machine() -> Machine:
    return Machine(available_memory(), visible_gpus())


def available_memory(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Free or reclaimable bytes: the machine's, or what a container's limit (cgroup v2) leaves of them."""
    found = re.search(r"^MemAvailable:\s+([0-9]+) kB", meminfo.read_text(), re.MULTILINE)
    available = int(found.group(1)) * 1024 if found else 0
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
        cached = re.search(r"^inactive_file ([0-9]+)", (cgroup / "memory.stat").read_text(), re.MULTILINE)
    except OSError:  # no cgroup v2, or its root, which has no limit
        return available
    if limit == "max":
        return available
    return max(0, min(available, int(limit) - used + (int(cached.group(1)) if cached else 0)))


def visible_gpus() -> tuple[Gpu, ...]:
    """The GPUs the CUDA driver shows to this process, in its order; none where there is no driver."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    count = ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return ()
    names = device_names(count.value, os.environ)
    return tuple(_gpu(cuda, index, name) for index, name in enumerate(names))


def device_names(count: int, environment: Mapping[str, str]) -> list[str]:
    """The driver counts from 0 what CUDA_VISIBLE_DEVICES leaves; a child is told the name used there."""
    chosen = [name.strip() for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return (chosen or [str(index) for index in range(count)])[:count]


def _gpu(cuda: ctypes.CDLL, index: int, device_name: str) -> Gpu:
    device, name, number = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_int()
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, len(name), device)
    parts = []
    for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR):
        cuda.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
        parts.append(str(number.value))
    return Gpu(name.value.decode(), ".".join(parts), device_name)
