"""May this repository be served here? Every byte as it was built, every engine built for this very machine."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from nvlm_deploy.artifacts import some
from nvlm_deploy.errors import MachineError, NvlmError, RejectedError
from nvlm_deploy.fingerprint import VERSION_MEND, Fingerprint, fingerprints_of, mismatches, require_fitting
from nvlm_deploy.llm.engine_tool import CONTAINERS_HINT
from nvlm_deploy.machine.nvidia_smi import Gpus, gpus_here
from nvlm_deploy.manifest import MANIFEST_NAME, read_manifest
from nvlm_deploy.sku import TENSORRT, TENSORRT_LLM, TENSORRT_RTX
from nvlm_deploy.triton.ensemble import ENSEMBLE
from nvlm_deploy.triton.repository import CONFIG_NAME, read_repository
from nvlm_deploy.verification import DEFAULT_DEMAND, Demand, verified

log = logging.getLogger(__name__)

# in a folder MODEL/VERSION, and the runtimes that build such a file
_ENGINES = {"*/*/*.plan": (TENSORRT, TENSORRT_RTX), "*/*/*.engine": (TENSORRT_LLM,)}


def require_servable(repository: Path, demand: Demand = DEFAULT_DEMAND) -> None:
    """Raises RejectedError naming every byte, signature, list or machine that is another than when it was built.

    NvlmError for a folder that is no repository, MachineError where no driver answers for the engines in it.
    """
    require_as_built(repository, demand)
    _require_this_machine(repository)


def require_as_built(repository: Path, demand: Demand = DEFAULT_DEMAND) -> None:
    """As `require_servable`, whatever machine this is."""
    if not (repository / MANIFEST_NAME).exists():
        _require_repository(repository)
    found = verified(repository, demand)
    if not found.passed:
        sentences = "\n".join(f"  {problem.what}" for problem in found.problems)
        mends = dict.fromkeys(problem.mend for problem in found.problems)
        raise RejectedError(f"{repository} is not what was built:\n{sentences}", hint="; or ".join(mends))
    for note in found.not_looked_at:
        log.info("not looked at: %s", note)
    _require_repository(repository)


def why_not_here(repository: Path) -> str | None:
    """Return why this machine would not serve a repository, for whoever only plans to; None where it would."""
    try:
        _require_this_machine(repository)
    except NvlmError as problem:
        return problem.message
    return None


def _require_repository(repository: Path) -> None:
    """Raises NvlmError for a folder that is no repository.

    Without tritonclient, on a machine that only plans, its configs are not read: that they are there must do.
    """
    try:
        read_repository(repository)
    except ModuleNotFoundError as problem:
        if not (problem.name or "").startswith("tritonclient"):
            raise
        if not (repository / ENSEMBLE / CONFIG_NAME).is_file():
            raise NvlmError(f"{repository} has no model {ENSEMBLE}: not a repository of ours") from None
        log.warning("the configs of %s are not cross-checked: tritonclient is not installed here", repository)


def _require_this_machine(repository: Path) -> None:
    fingerprints = fingerprints_of(read_manifest(repository), str(repository))
    for pattern, runtimes in _ENGINES.items():
        engine = next(iter(sorted(repository.glob(pattern))), None)
        if engine and not any(fingerprint.runtime in runtimes for fingerprint in fingerprints.values()):
            raise RejectedError(
                f"{repository} does not say what machine {engine.name} was built on",
                hint="`nvlm build` makes it again; what was built before engines had fingerprints is not served",
            )
    try:
        require_fitting(fingerprints, str(repository))
    except NvlmError as problem:
        beside = some(_fitting_neighbours(repository)) or "none"
        fitting = f"  repositories beside it that would run here: {beside}"
        containers = f"; {CONTAINERS_HINT}" if VERSION_MEND in (problem.hint or "") else ""
        raise type(problem)(f"{problem.message}\n{fitting}", hint=f"{problem.hint}{containers}") from None


def remove_caches(repository: Path) -> None:
    """Python's own caches of each `model.py`: nobody vouches for them, and Python would run them in its place."""
    for cache in repository.glob("**/__pycache__"):
        try:
            shutil.rmtree(cache)
        except OSError as problem:
            raise NvlmError(
                f"{cache} cannot be removed: {problem.strerror}; it would be run unseen", hint=f"rm -r {cache}"
            ) from None


def _fitting_neighbours(repository: Path) -> list[str]:
    """Repositories beside this one that were built for this machine."""
    try:
        found = gpus_here(os.environ)
    except MachineError:
        found = Gpus((), {})
    return [path.name for path in sorted(repository.resolve().parent.iterdir()) if _fits(path, found)]


def _fits(repository: Path, found: Gpus) -> bool:
    if not (repository / MANIFEST_NAME).is_file():
        return False
    try:
        read_repository(repository)
        fingerprints: list[Fingerprint] = [*fingerprints_of(read_manifest(repository), "").values()]
    except NvlmError:
        return False
    return not any(mismatches(fingerprint, found) for fingerprint in fingerprints)
