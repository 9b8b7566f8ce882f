"""A program `nvidia-smi` with recorded answers (README.md): the GPUs of a machine that is not here."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from nvlm_deploy.machine import resources
from nvlm_deploy.machine.resources import Gpu

FIELDS = "index,uuid,name,compute_cap,driver_version,memory.total,memory.used,mig.mode.current"
DRIVER = "580.95.05"
NAMES = {
    "H100": ("NVIDIA H100 80GB HBM3", "9.0", 81559, "Disabled"),
    "H200": ("NVIDIA H200", "9.0", 143771, "Disabled"),
    "A100": ("NVIDIA A100-SXM4-80GB", "8.0", 81920, "Disabled"),
    "L40S": ("NVIDIA L40S", "8.9", 46068, "[N/A]"),
}

PROGRAM = """#!{python}
import json, sys
told = json.load(open({told!r}))
arguments = " ".join(sys.argv[1:])
if told["fails"]:
    print(told["fails"][1]); sys.exit(told["fails"][0])
if arguments == "--query-gpu={fields} --format=csv,noheader,nounits":
    print(told["query"])
elif arguments == "topo -m":
    print(told["topology"])
else:
    sys.exit("not a question that was recorded: " + arguments)
"""


def row(index: int, kind: str, *, driver: str = DRIVER, used: int = 4, mig: str | None = None) -> str:
    name, capability, total, usual_mig = NAMES[kind]
    uuid = f"GPU-{index}5ba4a2e-1b4b-9f2a-0c53-0a7a6d1d7f0{index}"
    return f"{index}, {uuid}, {name}, {capability}, {driver}, {total}, {used}, {mig or usual_mig}"


def topology(count: int, connection: str) -> str:
    """As printed on a terminal: tabs, and the header underlined."""
    header = "\t".join(["\x1b[4m", *(f"GPU{index}" for index in range(count)), "CPU Affinity", "NUMA Affinity"])
    rows = [
        "\t".join([f"GPU{one}", *(" X " if one == other else connection for other in range(count)), "0-47,96-143", "0"])
        for one in range(count)
    ]
    return "\n".join(
        [header + "\x1b[0m", *rows, "", "Legend:", "", "  X    = Self", "  NV#  = Connection of # NVLinks"]
    )


class FakeNvidiaSmi:
    """First on PATH from the moment it is made; CUDA shows the same GPUs, or those of `cuda_shows`."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder.mkdir()
        self.told = folder / "told.json"
        program = folder / "nvidia-smi"
        program.write_text(PROGRAM.format(python=sys.executable, told=str(self.told), fields=FIELDS))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", os.pathsep.join([str(folder), os.environ["PATH"]]))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        self._cuda: list[Gpu] | None = None
        monkeypatch.setattr(resources, "visible_gpus", self.visible_gpus)
        self.machine("H100")

    def visible_gpus(self) -> tuple[Gpu, ...]:
        if self._cuda is not None:
            return tuple(self._cuda)
        rows = [line.split(", ") for line in json.loads(self.told.read_text())["query"].splitlines()]
        return tuple(Gpu(row[2], row[3], row[0]) for row in rows if len(row) > 3)

    def cuda_shows(self, *kinds: str) -> None:
        self._cuda = [Gpu(NAMES[kind][0], NAMES[kind][1], str(index)) for index, kind in enumerate(kinds)]

    def says_bytes(self, answer: bytes) -> None:
        """To every question, whatever it is."""
        (self.told.parent / "answer").write_bytes(answer)
        program = self.told.parent / "nvidia-smi"
        program.write_text(f"#!/bin/sh\ncat {self.told.parent}/answer\n")

    def machine(self, *kinds: str, connection: str = "NV18", driver: str = DRIVER, used: int = 4) -> None:
        self.rows([row(index, kind, driver=driver, used=used) for index, kind in enumerate(kinds)], connection)

    def rows(self, rows: Sequence[str], connection: str = "NV18") -> None:
        self._tell(query="\n".join(rows), topology=topology(len(rows), connection), fails=None)

    def fails(self, code: int, words: str) -> None:
        self._tell(query="", topology="", fails=[code, words])

    def _tell(self, **answers: object) -> None:
        self.told.write_text(json.dumps(answers))


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    """Distributions of these versions and no module, for `importlib.metadata` in this process."""
    for name, version in versions.items():
        for old in folder.glob(f"{name}-*.dist-info"):
            (old / "METADATA").unlink()
            old.rmdir()
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if str(folder) not in sys.path:
        monkeypatch.syspath_prepend(str(folder))
