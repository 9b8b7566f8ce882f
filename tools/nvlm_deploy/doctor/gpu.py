"""The driver and the GPUs: are they there, of the right kind, whole, free, and joined?"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from nvlm_deploy.doctor.needs import Needs
from nvlm_deploy.fingerprint import mismatches
from nvlm_deploy.llm.engine_tool import RELEASES
from nvlm_deploy.llm.preflight import Finding
from nvlm_deploy.machine.nvidia_smi import GpuFacts, Gpus
from nvlm_deploy.sku import Sku, load_sku, sku_names

GIB = 2**30
# CUDA 13.x (NVIDIA, CUDA Compatibility, table "Minimum and Maximum Required Driver Versions"); the containers of
# TensorRT-LLM 1.1 and later are made with it
LEAST_DRIVER = 580
# of a GPU that nobody else uses the driver takes less
BUSY_BYTES = GIB


def gpu_findings(gpus: Gpus, needs: Needs | None) -> Iterator[Finding]:
    """For a machine whose driver answers."""
    yield _driver(gpus.gpus)
    yield _kinds(gpus.gpus, needs)
    used = gpus.gpus[: needs.gpus] if needs else gpus.gpus
    yield _whole(used, needs)
    if needs is None or needs.has_gpu:
        yield _free(used)
    if needs and needs.gpus and used:
        yield _memory(used, needs)
        if needs.profile.decoder.tensor_parallel > 1:
            yield _joined(gpus, needs)
        yield from _bound(gpus, needs)


def no_driver(problem: str, hint: str | None, needs: Needs | None) -> Finding:
    """Right where no GPU is needed."""
    if needs is None or not needs.has_gpu:
        suffix = "profiles for `cpu` run here" if needs is None else f"profile {needs.profile.name} needs none"
        return Finding("driver", True, f"{problem}; {suffix}")
    return Finding("driver", False, problem, hint)


def _driver(gpus: Sequence[GpuFacts]) -> Finding:
    if not gpus:
        return Finding("driver", True, "nvidia-smi answers")
    version = gpus[0].driver
    found = re.match(r"[0-9]+", version)
    right = found is not None and int(found[0]) >= LEAST_DRIVER
    made_for = ", ".join(release.name for release in RELEASES[:3])
    fix = f"install driver {LEAST_DRIVER} or newer: containers with TensorRT-LLM {made_for} are made with CUDA 13"
    return Finding("driver", right, f"{version}, at least {LEAST_DRIVER} is needed", None if right else fix)


def _kinds(gpus: Sequence[GpuFacts], needs: Needs | None) -> Finding:
    here = ", ".join(f"{gpu.name} ({_sku_name(gpu)})" for gpu in gpus) or "none visible"
    if needs is None or not needs.has_gpu:
        return Finding("GPU", True, f"{len(gpus)}: {here}" if gpus else here)
    right = [gpu for gpu in gpus[: needs.gpus] if needs.sku.is_gpu(gpu.name, gpu.compute_capability)]
    if len(right) >= needs.gpus:
        return Finding("GPU", True, f"{len(gpus)}: {here}; {needs.gpus} needed")
    others = [gpu for gpu in gpus if needs.sku.is_gpu(gpu.name, gpu.compute_capability)]
    fix = f"choose a profile for what is here (`nvlm profiles`), or a machine with {needs.gpus} x {needs.sku.name}"
    if len(others) >= needs.gpus:
        indices = ",".join(str(gpu.index) for gpu in others[: needs.gpus])
        fix = f"export CUDA_VISIBLE_DEVICES={indices}"
    return Finding("GPU", False, f"{here}; {needs.gpus} x {needs.sku.name} needed", fix)


def _sku_name(gpu: GpuFacts) -> str:
    known = [name for name in sku_names() if load_sku(name).is_gpu(gpu.name, gpu.compute_capability)]
    return known[0] if known else f"compute capability {gpu.compute_capability}, no SKU of ours"


def _whole(gpus: Sequence[GpuFacts], needs: Needs | None) -> Finding:
    """Engines for whole GPUs do not fit in slices; NVLM-D-72B fits in no slice there is."""
    divided = [str(gpu.index) for gpu in gpus if gpu.mig]
    right = not divided or (needs is not None and not needs.has_gpu)
    found = f"enabled on GPU {', '.join(divided)}" if divided else "not enabled"
    fix = None if right else f"nvidia-smi -i {','.join(divided)} -mig 0   (as root, with no program on the GPU)"
    return Finding("MIG", right, found, fix)


def _free(gpus: Sequence[GpuFacts]) -> Finding:
    busy = [gpu for gpu in gpus if gpu.used_bytes > BUSY_BYTES]
    found = ", ".join(f"GPU {gpu.index} {gpu.used_bytes / GIB:.1f} GiB" for gpu in busy)
    fix = "stop what uses it: `nvidia-smi --query-compute-apps=pid,name,used_memory --format=csv`"
    return Finding("GPU in use", not busy, f"by others: {found}" if busy else "by nobody", fix if busy else None)


def _memory(gpus: Sequence[GpuFacts], needs: Needs) -> Finding:
    """The planner's account, in what is free here now."""
    from nvlm_deploy.planning.memory import Room, memory_account

    if needs.spec is None:
        return Finding("GPU memory", True, "no model was named")
    free = min((_visible(gpu, needs.sku) - gpu.used_bytes for gpu in gpus), default=0)
    account = memory_account(needs.spec, needs.profile, Room(free, "GPU", "measured"))
    if account.fits:
        left = f"{account.kv_tokens:,} tokens of KV cache beside everything else"
        return Finding("GPU memory", True, f"{free / GIB:.1f} GiB free on each GPU: {left} (derived)")
    fix = "`nvlm profiles` names the profiles that fit; or stop what uses the GPU"
    return Finding("GPU memory", False, f"{account.why_not} (derived)", fix)


def _visible(gpu: GpuFacts, sku: Sku) -> int:
    """CUDA shows less than nvidia-smi's total; where the driver does not say, as the SKU."""
    return min(gpu.total_bytes, sku.visible_bytes) if gpu.total_bytes and sku.visible_bytes else sku.visible_bytes


def _joined(gpus: Gpus, needs: Needs) -> Finding:
    """Of GPUs whose kind has NVLink, those of one tensor-parallel group must be joined by it."""
    apart = gpus.without_nvlink(needs.gpus)
    link = needs.sku.interconnect
    if link is None or link.kind == "pcie":
        return Finding("NVLink", True, f"{needs.sku.name} has none: GPUs talk over PCIe")
    if not gpus.connections:
        return Finding("NVLink", False, "`nvidia-smi topo -m` does not say how the GPUs are joined", "run it yourself")
    if not apart:
        kinds = ", ".join(sorted(set(gpus.connections.values())))
        return Finding("NVLink", True, f"joins all {needs.gpus} GPUs ({kinds})")
    pairs = ", ".join(f"{one} and {other} ({gpus.connections[one, other]})" for one, other in apart[:3])
    fix = "choose GPUs that `nvidia-smi topo -m` shows with NV# between them (CUDA_VISIBLE_DEVICES)"
    return Finding("NVLink", False, f"does not join GPU {pairs}", fix)


def _bound(gpus: Gpus, needs: Needs) -> Iterator[Finding]:
    """Of a repository: each engine against this machine."""
    for step, fingerprint in needs.fingerprints.items():
        wrong = mismatches(fingerprint, gpus)
        found = (
            "; ".join(map(str, wrong)) or f"{fingerprint.gpu or fingerprint.compute_capability}, {fingerprint.cohort}"
        )
        fix = "; or ".join(dict.fromkeys(mismatch.mend for mismatch in wrong)) or None
        yield Finding(f"engine of {step}", not wrong, found, fix)
