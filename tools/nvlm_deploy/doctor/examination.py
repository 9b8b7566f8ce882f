"""All findings about this machine, for a profile, for a repository, or for neither."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from nvlm_deploy.doctor.gpu import gpu_findings, no_driver
from nvlm_deploy.doctor.host import Place, host_findings
from nvlm_deploy.doctor.needs import Needs
from nvlm_deploy.errors import MachineError
from nvlm_deploy.fingerprint import profiles_for
from nvlm_deploy.llm.preflight import Finding
from nvlm_deploy.machine import resources
from nvlm_deploy.machine.nvidia_smi import Gpus, gpus_here


@dataclass(frozen=True)
class Examination:
    """`profiles` are the shipped ones whose GPUs are here."""

    findings: tuple[Finding, ...]
    profiles: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return all(finding.passed for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        findings = [asdict(finding) for finding in self.findings]
        return {"passed": self.passed, "findings": findings, "profiles": list(self.profiles)}


def examination(needs: Needs | None, place: Place) -> Examination:
    """Never raises for what it finds: that is the answer. Changes nothing."""
    gpus: Gpus | MachineError
    try:
        gpus = gpus_here(os.environ)
    except MachineError as problem:
        gpus = problem
    findings = (*_of_gpus(gpus, needs), *host_findings(needs, place))
    return Examination(findings, tuple(profiles_for(gpus if isinstance(gpus, Gpus) else Gpus((), {}))))


def _of_gpus(gpus: Gpus | MachineError, needs: Needs | None) -> Iterator[Finding]:
    shown_by_cuda = resources.visible_gpus()
    if isinstance(gpus, Gpus):
        yield from gpu_findings(gpus, needs, shown_by_cuda)
    else:
        yield no_driver(gpus, needs, shown_by_cuda)
