"""The driver and the GPUs: are they there, of the right kind, whole, free, and joined?"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from nvlm_deploy.doctor.needs import Needs
from nvlm_deploy.errors import MachineError
from nvlm_deploy.fingerprint import mismatches
from nvlm_deploy.llm.engine_tool import RELEASES
from nvlm_deploy.llm.preflight import Finding
from nvlm_deploy.machine.nvidia_smi import EXECUTABLE, GpuFacts, Gpus, NoDriverError, is_nvlink
from nvlm_deploy.machine.resources import Gpu
from nvlm_deploy.sku import Sku, load_sku, sku_names

GIB = 2**30
# CUDA 13.x (NVIDIA, CUDA Compatibility, table "Minimum and Maximum Required Driver Versions"); the containers of
# TensorRT-LLM 1.1 and later are made with it
LEAST_DRIVER = 580
# of a GPU that nobody else uses the driver takes less
BUSY_BYTES = GIB
# without `compute` a container has no libcuda, without `utility` no nvidia-smi (NVIDIA Container Toolkit)
_CAPABILITIES = "in a container: `docker run --gpus all -e NVIDIA_DRIVER_CAPABILITIES=compute,utility`"


def gpu_findings(gpus: Gpus, needs: Needs | None, shown_by_cuda: Sequence[Gpu]) -> Iterator[Finding]:
    """For a machine whose driver answers; `shown_by_cuda` are the GPUs that programs will get."""
    if needs is not None and not needs.has_gpu and not needs.fingerprints:
        yield Finding("driver", True, f"{EXECUTABLE} answers; profile {needs.profile.name} needs no GPU")
        return
    yield _driver(gpus.gpus)
    kinds = _kinds(gpus.gpus, needs)
    yield kinds
    used = gpus.gpus[: needs.gpus] if needs else gpus.gpus
    if used:
        divided = any(gpu.mig for gpu in gpus.gpus)
        if not divided:  # of a divided GPU CUDA shows the slices
            yield _shown(gpus.gpus, shown_by_cuda)
        yield _whole(used)
        yield _free(used)
        if needs and kinds.passed and not divided:
            yield _memory(used, needs)
            if needs.profile.decoder.tensor_parallel > 1:
                yield _joined(gpus, needs)
    yield from _bound(gpus, needs) if needs else ()


def no_driver(problem: MachineError, needs: Needs | None, shown_by_cuda: Sequence[Gpu]) -> Finding:
    """Right where no GPU is needed, or where none was ever promised."""
    if needs is not None and not needs.has_gpu and not needs.fingerprints:
        return Finding("driver", True, f"{problem.message}; profile {needs.profile.name} needs none")
    if shown_by_cuda:
        names = _counted(gpu.name for gpu in shown_by_cuda)
        return Finding("driver", False, f"{problem.message}; CUDA shows {names}", _CAPABILITIES)
    if needs is None and isinstance(problem, NoDriverError):
        return Finding("driver", True, f"{problem.message}; profiles for `cpu` run here")
    return Finding("driver", False, problem.message, problem.hint)


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
    here = _counted(f"{gpu.name} ({_sku_name(gpu)})" for gpu in gpus) if gpus else "none visible"
    if needs is None or not needs.has_gpu:
        return Finding("GPU", True, here)
    right = [gpu for gpu in gpus[: needs.gpus] if needs.sku.is_gpu(gpu.name, gpu.compute_capability)]
    if len(right) >= needs.gpus:
        return Finding("GPU", True, f"{here}; {needs.gpus} needed")
    others = [gpu for gpu in gpus if needs.sku.is_gpu(gpu.name, gpu.compute_capability)]
    fix = f"choose a profile for what is here (`nvlm profiles`), or a machine with {needs.gpus} x {needs.sku.name}"
    if len(others) >= needs.gpus:
        indices = ",".join(str(gpu.index) for gpu in others[: needs.gpus])
        fix = f"`export CUDA_VISIBLE_DEVICES={indices}`"
    elif "CUDA_VISIBLE_DEVICES" in os.environ:
        fix = f"`unset CUDA_VISIBLE_DEVICES`, if it hides the right ones; or {fix}"
    return Finding("GPU", False, f"{here}; {needs.gpus} x {needs.sku.name} needed", fix)


def _sku_name(gpu: GpuFacts) -> str:
    known = [name for name in sku_names() if load_sku(name).is_gpu(gpu.name, gpu.compute_capability)]
    return known[0] if known else f"compute capability {gpu.compute_capability}, no SKU of ours"


def _shown(gpus: Sequence[GpuFacts], shown_by_cuda: Sequence[Gpu]) -> Finding:
    """nvidia-smi and CUDA's library can disagree: then plans are made for GPUs that no program gets."""
    told = [(gpu.name, gpu.compute_capability) for gpu in gpus]
    shown = [(gpu.name, gpu.compute_capability) for gpu in shown_by_cuda]
    if told == shown:
        return Finding("CUDA", True, f"shows programs the same {len(shown)} as nvidia-smi")
    found = f"shows programs {_counted(name for name, _ in shown)}; nvidia-smi {_counted(name for name, _ in told)}"
    if sorted(told) == sorted(shown):
        return Finding("CUDA", False, found, "count as nvidia-smi does: `export CUDA_DEVICE_ORDER=PCI_BUS_ID`")
    fix = f"{_CAPABILITIES}; on a host with NVSwitch: `systemctl start nvidia-fabricmanager`"
    return Finding("CUDA", False, found, fix)


def _counted(names: Iterable[str]) -> str:
    counts = Counter(names)
    return ", ".join(f"{count} x {name}" for name, count in counts.items()) or "none"


def _whole(gpus: Sequence[GpuFacts]) -> Finding:
    """Engines for whole GPUs do not fit in slices; NVLM-D-72B fits in no slice there is."""
    divided = [str(gpu.index) for gpu in gpus if gpu.mig]
    if not divided:
        return Finding("MIG", True, "not enabled")
    fix = f"`nvidia-smi -i {','.join(divided)} -mig 0` (as root, with no program on the GPU)"
    return Finding("MIG", False, f"enabled on GPU {', '.join(divided)}", fix)


def _free(gpus: Sequence[GpuFacts]) -> Finding:
    if any(gpu.memory_unknown for gpu in gpus):
        return _unknown_memory("GPU in use", gpus)
    used = {gpu.index: (gpu.used_bytes or 0) for gpu in gpus}
    busy = ", ".join(f"GPU {index} {taken / GIB:.1f} GiB" for index, taken in used.items() if taken > BUSY_BYTES)
    fix = "stop what uses it: `nvidia-smi --query-compute-apps=pid,name,used_memory --format=csv`"
    return Finding("GPU in use", not busy, f"by others: {busy}" if busy else "by nobody", fix if busy else None)


def _unknown_memory(check: str, gpus: Sequence[GpuFacts]) -> Finding:
    def said(size_bytes: int | None) -> str:
        return "not said" if size_bytes is None else f"{size_bytes / GIB:.1f} GiB"

    told = [f"GPU {gpu.index} {said(gpu.used_bytes)} of {said(gpu.total_bytes)}" for gpu in gpus if gpu.memory_unknown]
    fix = "see what `nvidia-smi --query-gpu=index,memory.total,memory.used --format=csv` says; both must be numbers"
    return Finding(check, False, f"unknown: {', '.join(told)}", fix)


def _memory(gpus: Sequence[GpuFacts], needs: Needs) -> Finding:
    """The planner's account, in what is free here now."""
    from nvlm_deploy.planning.memory import Room, memory_account

    if needs.spec is None:
        return Finding("GPU memory", True, "no model was named")
    if any(gpu.memory_unknown for gpu in gpus):
        return _unknown_memory("GPU memory", gpus)
    free = min(_visible(gpu, needs.sku) - (gpu.used_bytes or 0) for gpu in gpus)
    account = memory_account(needs.spec, needs.profile, Room(max(0, free), "GPU", "measured"))
    if account.fits:
        left = f"{account.kv_tokens:,} tokens of KV cache beside everything else"
        return Finding("GPU memory", True, f"{free / GIB:.1f} GiB free on each GPU: {left} (derived)")
    fix = "`nvlm profiles` names the profiles that fit; or stop what uses the GPU"
    return Finding("GPU memory", False, f"{account.why_not} (derived)", fix)


def _visible(gpu: GpuFacts, sku: Sku) -> int:
    """CUDA shows less than nvidia-smi's total, as the SKU says."""
    return min(gpu.total_bytes or 0, sku.visible_bytes)


def _joined(gpus: Gpus, needs: Needs) -> Finding:
    """Of GPUs whose kind has NVLink, those of one tensor-parallel group must be joined by it."""
    link = needs.sku.interconnect
    if link is None or link.kind == "pcie":
        return Finding("NVLink", True, f"{needs.sku.name} has none: GPUs talk over PCIe")
    pairs = gpus.pairs(needs.gpus)
    if unknown := [f"{one} and {other}" for (one, other), connection in pairs.items() if connection is None]:
        fix = (
            "read `nvidia-smi topo -m`: NV# must stand where the GPUs' row and column meet; "
            "`nvidia-smi nvlink --status` names links that are down"
        )
        return Finding("NVLink", False, f"unknown between GPU {', '.join(unknown[:3])}", fix)
    kinds = {pair: connection for pair, connection in pairs.items() if connection is not None}
    apart = [f"{one} and {other} ({kind})" for (one, other), kind in kinds.items() if not is_nvlink(kind)]
    if apart:
        fix = "`export CUDA_VISIBLE_DEVICES=...` with GPUs that `nvidia-smi topo -m` shows with NV# between them"
        return Finding("NVLink", False, f"does not join GPU {', '.join(apart[:3])}", fix)
    return Finding("NVLink", True, f"joins all {needs.gpus} GPUs ({', '.join(sorted(set(kinds.values())))})")


def _bound(gpus: Gpus, needs: Needs) -> Iterator[Finding]:
    """Of a repository: each engine against this machine."""
    for step, fingerprint in needs.fingerprints.items():
        wrong = mismatches(fingerprint, gpus)
        found = (
            "; ".join(map(str, wrong)) or f"{fingerprint.gpu or fingerprint.compute_capability}, {fingerprint.cohort}"
        )
        fix = "; or ".join(dict.fromkeys(mismatch.mend for mismatch in wrong)) or None
        yield Finding(f"engine of {step}", not wrong, found, fix)
