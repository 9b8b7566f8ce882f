"""GPUs of this machine as nvidia-smi tells them: the one tool that is wherever a driver is, in containers too.

Fields, units and the word for "not known" are those of nvidia-smi(1) and `nvidia-smi --help-query-gpu`, driver 535 to
610; `compute_cap` is there since 510. It knows nothing of CUDA_VISIBLE_DEVICES, so what that leaves is chosen here.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nvlm_deploy.errors import MachineError

EXECUTABLE = "nvidia-smi"
FIELDS = ("index", "uuid", "name", "compute_cap", "driver_version", "memory.total", "memory.used", "mig.mode.current")
MIB = 1 << 20
_TIMEOUT_S = 60
_INSTALL = (
    "install NVIDIA's driver, or start the container with its GPUs (`--gpus all`); profiles for `cpu` need neither"
)
_UNREADABLE = f"look at `{EXECUTABLE}` yourself; drivers before 510 are too old for this tool"
# `[N/A]`, `[Not Supported]`, `[Unknown Error]`: what nvidia-smi says in place of a number
_MEMORY = r"[0-9]{1,9}|N/A|\[[A-Za-z /]+\]"
_MIG = {"Enabled": True, "Disabled": False, "[N/A]": None, "N/A": None, "[Not Supported]": None}
_PATTERNS = {
    "index": "[0-9]{1,4}",
    "uuid": "[!-~]+",
    "name": "[ -~]+",
    "compute_cap": r"[0-9]{1,3}\.[0-9]{1,3}",
    "driver_version": r"[0-9]{1,6}(\.[0-9]{1,6})*",
    "memory.total": _MEMORY,
    "memory.used": _MEMORY,
    "mig.mode.current": "|".join(map(re.escape, _MIG)),
}
# the kinds of a connection in `nvidia-smi topo -m`, by its legend; NV# is a bond of # NVLinks
_NVLINK = re.compile(r"NV[0-9]+")
_CONNECTION = re.compile(rf"{_NVLINK.pattern}|SYS|NODE|PHB|PXB|PIX")


class NoDriverError(MachineError):
    """Nothing here ever was told of a GPU: right for a machine that has none."""


@dataclass(frozen=True)
class GpuFacts:
    """One GPU; `mig` is None where the GPU cannot be divided, a number of bytes where the driver does not tell it."""

    index: int
    uuid: str
    name: str
    compute_capability: str
    driver: str
    total_bytes: int | None
    used_bytes: int | None
    mig: bool | None

    @property
    def memory_unknown(self) -> bool:
        """Also where the driver tells what cannot be."""
        return self.total_bytes is None or self.used_bytes is None or self.used_bytes > self.total_bytes


@dataclass(frozen=True)
class Gpus:
    """The GPUs this process may use, in its order, and the connection of each pair as `nvidia-smi topo -m` says it."""

    gpus: tuple[GpuFacts, ...]
    connections: Mapping[tuple[int, int], str]

    def pairs(self, count: int) -> dict[tuple[int, int], str | None]:
        """How each pair among the first `count` GPUs is joined; None where nobody says it."""
        first = sorted(gpu.index for gpu in self.gpus[:count])
        return {(one, other): self.connections.get((one, other)) for one in first for other in first if one < other}


def is_nvlink(connection: str) -> bool:
    return _NVLINK.fullmatch(connection) is not None


def gpus_here(environment: Mapping[str, str]) -> Gpus:
    """Raises NoDriverError where there is no driver, MachineError where it does not answer; no GPU is no error."""
    rows = _answer(f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits", may_find_nothing=True)
    gpus = visible(gpus_of(rows), environment.get("CUDA_VISIBLE_DEVICES"))
    return Gpus(gpus, _connections() if len(gpus) > 1 else {})


def _connections() -> dict[tuple[int, int], str]:
    """None known where this question alone has no answer: an engine runs all the same."""
    try:
        return connections_of(_answer("topo", "-m"))
    except MachineError:
        return {}


def gpus_of(text: str) -> tuple[GpuFacts, ...]:
    """The rows of `nvidia-smi --query-gpu=FIELDS --format=csv,noheader,nounits`. Raises MachineError for other text."""
    return tuple(_gpu([value.strip() for value in line.split(",")]) for line in text.splitlines() if line.strip())


def _gpu(row: Sequence[str]) -> GpuFacts:
    if len(row) != len(FIELDS):
        shown = ascii(", ".join(row))[:200]
        raise MachineError(f"{EXECUTABLE} answers {shown}, expected {', '.join(FIELDS)}", hint=_UNREADABLE)
    values = dict(zip(FIELDS, row, strict=True))
    for field, pattern in _PATTERNS.items():
        if not re.fullmatch(pattern, values[field]):
            shown = f"{values[field][:60]!a} for {field} of GPU {row[0][:9]!a}"
            raise MachineError(f"{EXECUTABLE} answers {shown}, which nobody can read", hint=_UNREADABLE)
    return GpuFacts(
        index=int(values["index"]),
        uuid=values["uuid"],
        name=values["name"],
        compute_capability=values["compute_cap"],
        driver=values["driver_version"],
        total_bytes=_bytes(values["memory.total"]),
        used_bytes=_bytes(values["memory.used"]),
        mig=_MIG[values["mig.mode.current"]],
    )


def _bytes(mib: str) -> int | None:
    """None where the driver does not say, as `[N/A]` on machines whose GPU shares the host's memory."""
    return int(mib) * MIB if mib[0].isdigit() else None


def visible(gpus: Sequence[GpuFacts], chosen: str | None) -> tuple[GpuFacts, ...]:
    """What CUDA_VISIBLE_DEVICES leaves: indices or the beginnings of uuids, to the first that is none (CUDA C++
    Programming Guide, "CUDA Environment Variables"). Where it names a MIG slice: the divided GPUs."""
    if chosen is None:
        return tuple(gpus)
    if chosen.strip().startswith("MIG-"):
        return tuple(gpu for gpu in gpus if gpu.mig)
    found: list[GpuFacts] = []
    for word in (word.strip() for word in chosen.split(",")):
        named = [gpu for gpu in gpus if word and (str(gpu.index) == word or gpu.uuid.startswith(word))]
        if len(named) != 1 or named[0] in found:
            break
        found += named
    return tuple(found)


def connections_of(text: str) -> dict[tuple[int, int], str]:
    """Of each pair of GPUs, lower index first, from the table of `nvidia-smi topo -m`."""
    lines = [line.split() for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()]
    header = next((line for line in lines if line[:1] == ["GPU0"] and "CPU" in line), [])
    columns = [int(word[3:]) for word in header if re.fullmatch(r"GPU[0-9]{1,4}", word)]
    found: dict[tuple[int, int], str] = {}
    for words in lines:
        if len(words) > len(columns) and re.fullmatch(r"GPU[0-9]{1,4}", words[0]) and "X" in words:
            row = int(words[0][3:])
            joined = zip(columns, words[1:], strict=False)
            found |= {(row, column): word for column, word in joined if row < column and _CONNECTION.fullmatch(word)}
    return found


def _answer(*arguments: str, may_find_nothing: bool = False) -> str:
    if shutil.which(EXECUTABLE) is None:
        raise NoDriverError(f"no {EXECUTABLE} on PATH: no NVIDIA driver is here", hint=_INSTALL)
    try:
        command = [EXECUTABLE, *arguments]
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
            timeout=_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise MachineError(
            f"{EXECUTABLE} did not answer in {_TIMEOUT_S} s", hint="a GPU hangs: see `dmesg | grep -i xid`"
        ) from None
    except OSError as problem:
        raise MachineError(f"{EXECUTABLE} cannot be run: {problem.strerror}", hint=_INSTALL) from None
    if may_find_nothing and "No devices were found" in done.stdout + done.stderr:
        return ""
    if done.returncode:
        words = " ".join(re.findall("[!-~]+", done.stdout + " " + done.stderr))[:200]
        raise MachineError(f"{EXECUTABLE} ended with {done.returncode}: {words or 'no words'}", hint=_INSTALL)
    return done.stdout
