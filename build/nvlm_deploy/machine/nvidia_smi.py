"""GPUs of this machine as nvidia-smi tells them: the one tool that is wherever a driver is, in containers too.

Fields, units and the word for "not known" are those of nvidia-smi(1) and `nvidia-smi --help-query-gpu`, driver 535 to
610; `compute_cap` is there since 510. It knows nothing of CUDA_VISIBLE_DEVICES, so what that leaves is chosen here.
"""

from __future__ import annotations

import csv
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
# the kinds of a connection in `nvidia-smi topo -m`; NV# is a bond of # NVLinks
_NVLINK = re.compile(r"NV[0-9]+")


@dataclass(frozen=True)
class GpuFacts:
    """One GPU; `mig` is None where the GPU cannot be divided."""

    index: int
    uuid: str
    name: str
    compute_capability: str
    driver: str
    total_bytes: int
    used_bytes: int
    mig: bool | None


@dataclass(frozen=True)
class Gpus:
    """The GPUs this process may use, in its order, and the connection of each pair as `nvidia-smi topo -m` says it."""

    gpus: tuple[GpuFacts, ...]
    connections: Mapping[tuple[int, int], str]

    def without_nvlink(self, count: int) -> list[tuple[int, int]]:
        """Pairs among the first `count` GPUs that NVLink does not join; unknown pairs are not among them."""
        first = [gpu.index for gpu in self.gpus[:count]]
        pairs = [(one, other) for one in first for other in first if one < other]
        return [pair for pair in pairs if pair in self.connections and not _NVLINK.fullmatch(self.connections[pair])]


def gpus_here(environment: Mapping[str, str]) -> Gpus:
    """Raises MachineError where there is no driver, or it does not answer; no GPU is no error."""
    rows = _answer(f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits", may_find_nothing=True)
    gpus = visible(gpus_of(rows), environment.get("CUDA_VISIBLE_DEVICES"))
    return Gpus(gpus, connections_of(_answer("topo", "-m")) if len(gpus) > 1 else {})


def gpus_of(text: str) -> tuple[GpuFacts, ...]:
    """The rows of `nvidia-smi --query-gpu=FIELDS --format=csv,noheader,nounits`."""
    rows = [row for row in csv.reader(text.splitlines(), skipinitialspace=True) if row]
    return tuple(_gpu(row) for row in rows)


def _gpu(row: Sequence[str]) -> GpuFacts:
    if len(row) != len(FIELDS) or not row[0].strip().isdigit():
        raise MachineError(f"{EXECUTABLE} answers {', '.join(row)!r}, expected {', '.join(FIELDS)}", hint=_UNREADABLE)
    index, uuid, name, capability, driver, total, used, mig = (value.strip() for value in row)
    if not re.fullmatch(r"[0-9]+\.[0-9]+", capability):
        raise MachineError(f"{EXECUTABLE} does not say the compute capability of {name}", hint=_UNREADABLE)
    known = {"Enabled": True, "Disabled": False}
    return GpuFacts(int(index), uuid, name, capability, driver, _mib(total) * MIB, _mib(used) * MIB, known.get(mig))


_UNREADABLE = f"look at `{EXECUTABLE}` yourself; drivers before 510 are too old for this tool"


def _mib(text: str) -> int:
    """0 where the driver does not say, as `[N/A]` on machines whose GPU shares the host's memory."""
    return int(text) if text.isdigit() else 0


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
        if len(named) != 1:
            break
        found += named
    return tuple(found)


def connections_of(text: str) -> dict[tuple[int, int], str]:
    """Of each pair of GPUs, lower index first, from the table of `nvidia-smi topo -m`."""
    lines = [line.split() for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()]
    header = next((line for line in lines if line[:1] == ["GPU0"] and "CPU" in line), [])
    columns = [int(word[3:]) for word in header if re.fullmatch(r"GPU[0-9]+", word)]
    found: dict[tuple[int, int], str] = {}
    for words in lines:
        if len(words) > len(columns) and re.fullmatch(r"GPU[0-9]+", words[0]) and "X" in words:
            row = int(words[0][3:])
            found |= {(row, column): word for column, word in zip(columns, words[1:], strict=False) if row < column}
    return found


def _answer(*arguments: str, may_find_nothing: bool = False) -> str:
    if shutil.which(EXECUTABLE) is None:
        raise MachineError(f"no {EXECUTABLE} on PATH: no NVIDIA driver is here", hint=_INSTALL)
    try:
        command = [EXECUTABLE, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise MachineError(
            f"{EXECUTABLE} did not answer in {_TIMEOUT_S} s", hint="a GPU hangs: see `dmesg | grep -i xid`"
        ) from None
    except OSError as problem:
        raise MachineError(f"{EXECUTABLE} cannot be run: {problem.strerror}", hint=_INSTALL) from None
    if may_find_nothing and "No devices were found" in done.stdout + done.stderr:
        return ""
    if done.returncode:
        words = " ".join((done.stdout + " " + done.stderr).split())[:200]
        raise MachineError(f"{EXECUTABLE} ended with {done.returncode}: {words or 'no words'}", hint=_INSTALL)
    return done.stdout
