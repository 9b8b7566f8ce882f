"""Fingerprint: the one kind of machine that a built engine runs on, recorded where it is built, compared where it runs.

A TensorRT plan belongs to one GPU, one TensorRT and, for TensorRT-LLM's engines, one release of that; TensorRT's own
refusals come late and read "serialization version 228 vs 237". The driver is compared too: what was measured was
measured with it. A plan of TensorRT-RTX is built for a compute capability, on any machine: it is bound to no driver.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from nvlm_deploy.artifacts import some, tool_versions
from nvlm_deploy.errors import MachineError, NvlmError, RejectedError, faults_of
from nvlm_deploy.machine.nvidia_smi import GpuFacts, Gpus, gpus_here
from nvlm_deploy.manifest import Manifest, read_manifest
from nvlm_deploy.profile import load_profile, profile_names
from nvlm_deploy.sku import TENSORRT, TENSORRT_LLM, TENSORRT_RTX, load_sku

# the profile's runtime -> the distributions whose versions its engines depend on; the first of each group that is here
_PARTS: Mapping[str, Mapping[str, Sequence[str]]] = {
    TENSORRT: {"TensorRT": ("tensorrt",), "TensorRT-LLM": ("tensorrt_llm",)},
    TENSORRT_LLM: {"TensorRT": ("tensorrt",), "TensorRT-LLM": ("tensorrt_llm",)},
    TENSORRT_RTX: {"TensorRT-RTX": ("tensorrt_rtx", "tensorrt_rtx_cu13_libs", "tensorrt_rtx_cu12_libs")},
}
ABSENT = "absent"
VERSION_MEND = "serve in the container it was built in, or build again in this one"
_AGAIN = "`nvlm build` makes the engine again"


@dataclass(frozen=True)
class Fingerprint:
    """What an engine was built on and for; None is what it does not depend on.

    `gpu` and `driver` as the driver itself names them, `tensorrt` the version of the library that reads the engine,
    `cohort` the versions that must be those of one container, `gpus` how many of them the engine takes.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    runtime: Annotated[str, Field(pattern=f"^({'|'.join(_PARTS)})$")]
    compute_capability: Annotated[str, Field(pattern=r"^[0-9]+\.[0-9]+$")]
    tensorrt: str
    cohort: str
    gpu: str | None = None
    mig: bool | None = None
    driver: str | None = None
    gpus: Annotated[int, Field(ge=1)] = 1

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: object, origin: str) -> Fingerprint:
        """Raises NvlmError for anything but what `as_json` gave."""
        try:
            found = TypeAdapter(cls).validate_json(json.dumps(value))
        except ValidationError as problem:
            raise NvlmError(f"{origin}: its fingerprint is damaged: {faults_of(problem)}", hint=_AGAIN) from None
        lacking = found.as_json().keys() - (value if isinstance(value, dict) else {}).keys()
        if found.runtime != TENSORRT_RTX:
            lacking |= {name for name in ("gpu", "driver") if getattr(found, name) is None}
        if lacking:
            names = ", ".join(sorted(lacking))
            raise NvlmError(f"{origin}: its fingerprint does not say {names}", hint=_AGAIN)
        return found


@dataclass(frozen=True)
class Mismatch:
    """One thing that differs, as the engine has it and as it is here."""

    what: str
    built: str
    here: str
    mend: str

    def __str__(self) -> str:
        return f"{self.what}: built with {self.built}, here {self.here}"


def depends_on_machine(runtime: str) -> bool:
    return runtime in _PARTS


def built_here(runtime: str, *, compute_capability: str | None, gpus: int = 1) -> Fingerprint | None:
    """The fingerprint of an engine that was just built here for a SKU's capability; None for runtimes without engines.

    Raises MachineError where the machine does not tell what a TensorRT engine depends on.
    """
    if not depends_on_machine(runtime) or compute_capability is None:
        return None
    versions = versions_here(runtime)
    bound = Fingerprint(runtime, compute_capability, *versions, gpus=gpus)
    if runtime == TENSORRT_RTX:
        return bound
    found = gpus_here(os.environ).gpus
    if not found:
        raise MachineError("no GPU here: an engine is bound to the GPU it is built on", hint="build where it will run")
    return fingerprint_of(found[0], bound)


def fingerprint_of(gpu: GpuFacts, like: Fingerprint) -> Fingerprint:
    """`like`, on this GPU."""
    return Fingerprint(
        like.runtime, gpu.compute_capability, like.tensorrt, like.cohort, gpu.name, gpu.mig, gpu.driver, like.gpus
    )


def versions_here(runtime: str) -> tuple[str, str]:
    """Of the library that reads the runtime's engines, and of the cohort: as `TensorRT 10.14.1.48, TensorRT-LLM 1.2.1`.

    From the installed distributions' own words: importing them takes half a minute and a GPU.
    """
    versions = {name: _version(distributions) for name, distributions in _PARTS[runtime].items()}
    return next(iter(versions.values())), ", ".join(f"{name} {version}" for name, version in versions.items())


def _version(distributions: Sequence[str]) -> str:
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ABSENT


def mismatches(built: Fingerprint, found: Gpus) -> list[Mismatch]:
    """What of this machine, with these GPUs, is not what an engine was built with; with as many GPUs as it takes."""
    return [*_of_gpus(built, found.gpus), *_of_versions(built)]


def _of_gpus(built: Fingerprint, gpus: Sequence[GpuFacts]) -> Iterator[Mismatch]:
    if len(gpus) < built.gpus:
        here = f"{len(gpus)} visible"
        mend = "give the server more GPUs: `export CUDA_VISIBLE_DEVICES=...`, `docker run --gpus all`"
        yield Mismatch("number of GPUs", str(built.gpus), here, mend)
    seen: set[str] = set()
    for gpu in gpus[: built.gpus]:
        for mismatch in _of_gpu(built, gpu):
            if str(mismatch) not in seen:
                yield mismatch
            seen.add(str(mismatch))


def _of_gpu(built: Fingerprint, gpu: GpuFacts) -> Iterator[Mismatch]:
    elsewhere = "serve on the GPU it was built on, or build for this one"
    if built.gpu is not None and gpu.name != built.gpu:
        yield Mismatch("GPU", built.gpu, gpu.name, elsewhere)
    if gpu.compute_capability != built.compute_capability:
        yield Mismatch("compute capability", built.compute_capability, gpu.compute_capability, elsewhere)
    if built.gpu is not None and bool(gpu.mig) != bool(built.mig):
        words = {False: "a whole GPU", True: "a GPU divided by MIG"}
        mend = f"`nvidia-smi -i {gpu.index} -mig {int(bool(built.mig))}`, or build again"
        yield Mismatch("MIG", words[bool(built.mig)], words[bool(gpu.mig)], mend)
    if built.driver is not None and gpu.driver != built.driver:
        mend = f"install driver {built.driver}, or build again with this one"
        yield Mismatch("driver", built.driver, gpu.driver, mend)


def _of_versions(built: Fingerprint) -> Iterator[Mismatch]:
    tensorrt, cohort = versions_here(built.runtime)
    if tensorrt != built.tensorrt:
        yield Mismatch("TensorRT", built.tensorrt, tensorrt, VERSION_MEND)
    if cohort != built.cohort:
        yield Mismatch("cohort", built.cohort, cohort, VERSION_MEND)


def fingerprints_of(manifest: Manifest, origin: str) -> dict[str, Fingerprint]:
    """By the step that built the engine. Raises NvlmError for one that is damaged."""
    return {step: Fingerprint.from_json(value, f"{origin}: {step}") for step, value in manifest.fingerprints.items()}


def require_fitting(fingerprints: Mapping[str, Fingerprint], origin: str) -> None:
    """Raises RejectedError naming everything that differs here, the mend, and the profiles that would run here.

    MachineError where no driver answers.
    """
    if not fingerprints:
        return
    found = _gpus_for(fingerprints)
    wrong = {step: mismatches(fingerprint, found) for step, fingerprint in fingerprints.items()}
    if any(wrong.values()):
        lines = [f"  {step}: {mismatch}" for step, found_wrong in wrong.items() for mismatch in found_wrong]
        lines.append(f"  profiles that would run here: {some(profiles_for(found))}")
        mends = dict.fromkeys(mismatch.mend for found_wrong in wrong.values() for mismatch in found_wrong)
        raise RejectedError(
            f"{origin} holds engines of another machine:\n" + "\n".join(lines), hint="; or ".join(mends)
        )


def profiles_for(found: Gpus) -> list[str]:
    """Shipped profiles whose SKU is among these GPUs, in the number that they take, and those for no GPU."""
    return [name for name in profile_names() if _runs_here(name, found)]


def _runs_here(name: str, found: Gpus) -> bool:
    profile = load_profile(name)
    sku, decoder = load_sku(profile.sku), profile.decoder
    wanted = decoder.tensor_parallel * decoder.pipeline_parallel
    right = [gpu for gpu in found.gpus if sku.is_gpu(gpu.name, gpu.compute_capability) and not gpu.mig]
    return sku.compute_capability is None or len(right) >= wanted


def _gpus_for(fingerprints: Mapping[str, Fingerprint]) -> Gpus:
    try:
        return gpus_here(os.environ)
    except MachineError as problem:
        wanted = ", ".join(
            dict.fromkeys(f.gpu or f"compute capability {f.compute_capability}" for f in fingerprints.values())
        )
        raise MachineError(f"its engines run on {wanted}, but {problem.message}", hint=problem.hint) from None


def require_fitting_repository(model_folder: Path) -> None:
    """For a model that Triton loads, by its folder REPOSITORY/MODEL/VERSION: as `require_fitting` for the repository.

    Raises NvlmError also where no manifest says what the engines were built on.
    """
    repository = model_folder.parents[1]
    manifest = read_manifest(repository)
    if not manifest.fingerprints:
        raise NvlmError(
            f"{repository} does not say what machine its engines were built on", hint="build and assemble it again"
        )
    require_fitting(fingerprints_of(manifest, str(repository)), str(repository))


def cohort_versions() -> dict[str, str]:
    """What every manifest says of the machine beside the step's own tools: `absent` where there is none."""
    try:
        driver = next((gpu.driver for gpu in gpus_here({}).gpus), ABSENT)
    except MachineError:
        driver = ABSENT
    return {
        **tool_versions(("tensorrt", "tensorrt_llm", "torch", "nvidia-pytriton")),
        "python": platform.python_version(),
        "CUDA driver": driver,
        # Triton's containers say their versions so (server/build.py)
        "tritonserver": os.environ.get("TRITON_SERVER_VERSION", ABSENT),
        "container": os.environ.get("NVIDIA_TRITON_SERVER_VERSION", ABSENT),
    }
