"""What each step of a build takes: host memory, disk, and time by a stated host. Rules, and where each comes from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.llm.engine import rank_memory_bytes
from nvlm_deploy.planning.known_models import PlannedModel
from nvlm_deploy.planning.roofline import EFFICIENCY, encoder_flops, linear_parameters
from nvlm_deploy.planning.serving import Workload
from nvlm_deploy.planning.weights import decoder_bytes, layout_of, vision_engine_bytes
from nvlm_deploy.profile import Profile
from nvlm_deploy.recipe import Recipe, steps_of_build
from nvlm_deploy.sku import ONNX_RUNTIME, Sku, load_sku

# peak of the export with the released shapes (tests/bench/bench_vision_export.py --full), rounded up
EXPORT_HOST_BYTES = 512 << 20
# TensorRT-RTX's own memory for all 45 blocks: 13.0 GB for BF16, 14.4 GB for FP8 (engines/EVIDENCE.md)
BUILDER_HOST_BYTES = 2 << 30
# TensorRT-RTX built all 45 blocks in 47 to 107 s for 12.3 GB of weights (engines/EVIDENCE.md)
BUILDER_S_PER_GB = 10.0
# the numerics gate: half an hour a tile with the released shapes on two cores (engines/EVIDENCE.md, extrapolated)
GATE_CORE_S_PER_TILE_AND_PARAMETER = 2 * 1800 / 6.16e9
# ONNX Runtime while it casts 16-bit weights to float32, six full-width blocks on the CPU: 2.97 times their bytes
ENCODER_COPIES = 3
# the same: 0.11e12 a second on two cores, extrapolated to 45 blocks
ENCODER_FLOPS_PER_CORE_S = 55e9
# beside the layer that calibration holds: 2457 MiB at its peak with a layer of 1674 (tests/bench/bench_quantize.py)
BESIDE_A_LAYER_BYTES = 1 << 30
# 774 MiB at its peak at the released width, whatever the number of layers (the same bench), rounded up
QUANTIZE_HOST_BYTES = 1 << 30
ASSEMBLE_S = 5.0


@dataclass(frozen=True)
class Host:
    """The machine that builds. The disk is by default a local NVMe drive, reading or writing."""

    cores: int = 2
    disk_bytes_per_s: float = 1e9

    def __post_init__(self) -> None:
        if not (self.cores >= 1 and 0 < self.disk_bytes_per_s < math.inf):
            raise NvlmError(
                f"a host of {self.cores} cores and {self.disk_bytes_per_s / 1e9:g} GB/s of disk is none",
                hint="give at least 1 core, and GB/s above 0",
            )

    def io_s(self, moved_bytes: float) -> float:
        return moved_bytes / self.disk_bytes_per_s


@dataclass(frozen=True)
class StepEstimate:
    """One step: host memory at its peak, what it leaves on the disk, time. Disk and time are derived.

    `scratch_bytes` are on the disk while it runs, beside what it leaves. `seconds` is None where nothing is known to
    estimate by; `how` says what the time is made of; `host_evidence` is measured where a run of ours with the released
    shapes gave the number, or its rule.
    """

    name: str
    host_bytes: int
    host_evidence: str
    disk_bytes: int
    seconds: float | None
    how: str
    scratch_bytes: int = 0


@dataclass(frozen=True)
class _Build:
    model: PlannedModel
    profile: Profile
    sku: Sku
    host: Host

    @property
    def encoder_bytes(self) -> int:
        return vision_engine_bytes(self.model.spec, self.profile.vision.precision)

    @property
    def encoder_parameters(self) -> int:
        return vision_engine_bytes(self.model.spec, "bf16") // 2

    @property
    def rank_bytes(self) -> int:
        layout = layout_of(self.model.spec, self.profile)
        return sum(decoder_bytes(layout, rank).total for rank in range(layout.parallelism.world_size))

    @property
    def decoder_checkpoint_bytes(self) -> int:
        return 2 * self.model.parameters_by_part["language_model"]


def most_disk_bytes(steps: Sequence[StepEstimate]) -> int:
    """Of a whole build at any time: what the steps before have left, and what one leaves and needs while it runs."""
    left = most = 0
    for step in steps:
        left += step.disk_bytes
        most = max(most, left + step.scratch_bytes)
    return most


def step_estimates(model: PlannedModel, profile: Profile, host: Host | None = None) -> tuple[StepEstimate, ...]:
    """The steps of `nvlm build` with this profile, in order."""
    build = _Build(model, profile, load_sku(profile.sku), host or Host())
    return tuple(_ESTIMATES[name](build) for name in steps_of_build(Recipe(Path(), profile, Path())))


def _export_vision(build: _Build) -> StepEstimate:
    seconds = build.host.io_s(2 * build.encoder_parameters + 2 * build.encoder_bytes)
    return StepEstimate(
        "export-vision", EXPORT_HOST_BYTES, "measured", build.encoder_bytes, seconds, "read, written, read back"
    )


def _build_vision(build: _Build) -> StepEstimate:
    host = 2 * build.encoder_parameters + BUILDER_HOST_BYTES
    tiles, cores = build.profile.vision.gate_tiles, build.host.cores
    gate_s = tiles * build.encoder_parameters * GATE_CORE_S_PER_TILE_AND_PARAMETER / cores
    gate = f"numerics gate on {_cores(cores)} {gate_s / 60:,.0f} min"
    if build.profile.vision.runtime == ONNX_RUNTIME:
        seconds = gate_s + build.host.io_s(2 * build.encoder_bytes)
        return StepEstimate("build-vision", host, "derived", build.encoder_bytes, seconds, f"{gate}, graph copied")
    builder_s = build.encoder_bytes / 1e9 * BUILDER_S_PER_GB
    how = f"{gate}, builder {builder_s / 60:.0f} min"
    return StepEstimate("build-vision", host, "measured", build.encoder_bytes, gate_s + builder_s, how)


def _calibrate_llm(build: _Build) -> StepEstimate:
    """The encoder runs on the CPU in float32, then layers run one at a time, on a GPU where there is one.

    On the disk are the encoder's graph, its float32 embeddings and the hidden states before and behind a layer.
    """
    spec, samples = build.model.spec, build.profile.calibration.samples
    tiles, tokens = samples * Workload().tiles(spec), samples * Workload().prompt_tokens(spec)
    embeddings = 4 * tiles * spec.tiling.tokens_per_tile * spec.decoder.hidden_size
    scratch = 2 * build.encoder_parameters + embeddings + 2 * 2 * tokens * spec.decoder.hidden_size
    encoder_s = tiles * sum(encoder_flops(spec).values()) / ENCODER_FLOPS_PER_CORE_S / build.host.cores
    how = f"encoder, {tiles:,} tiles on {_cores(build.host.cores)}, {encoder_s / 60:,.0f} min"
    rate = build.sku.dense_tflops.get("bf16", 0) * 1e12 * EFFICIENCY.sixteen_bit
    seconds = None
    if rate:
        layers_s = build.host.io_s(build.decoder_checkpoint_bytes) + 2 * linear_parameters(spec.decoder) * tokens / rate
        seconds = encoder_s + layers_s
        how += f"; weights read, {tokens:,} tokens on one GPU {layers_s / 60:,.0f} min"
    else:
        how += "; layers on this CPU: not known"
    return StepEstimate("calibrate-llm", calibration_host_bytes(build.model), "measured", 0, seconds, how, scratch)


def calibration_host_bytes(model: PlannedModel) -> int:
    """The encoder's weights as they are and in float32; when that is done, one layer."""
    encoder = ENCODER_COPIES * vision_engine_bytes(model.spec, "bf16")
    layer = 2 * linear_parameters(model.spec.decoder) // model.spec.decoder.layers
    return max(encoder, layer) + BESIDE_A_LAYER_BYTES


def _quantize_llm(build: _Build) -> StepEstimate:
    seconds = build.host.io_s(build.decoder_checkpoint_bytes + 2 * build.rank_bytes)
    return StepEstimate(
        "quantize-llm", QUANTIZE_HOST_BYTES, "measured", build.rank_bytes, seconds, "read, written, read back"
    )


def _build_llm(build: _Build) -> StepEstimate:
    layout = layout_of(build.model.spec, build.profile)
    at_once = build.profile.decoder.build_at_once or 1
    host, ranks = rank_memory_bytes(layout) * at_once, layout.parallelism.world_size
    seconds = -(-ranks // at_once) * (build.host.io_s(3 * build.rank_bytes // ranks) + 120)
    how = f"{ranks} rank(s), {at_once} at once: weights moved three times, 2 min of kernel timing each (assumed)"
    return StepEstimate("build-llm", host, "derived", build.rank_bytes, seconds, how)


def _assemble(build: _Build) -> StepEstimate:
    """A graph with its data is copied; a plan is linked, as the decoder is (triton/repository.py)."""
    is_graph = build.profile.vision.runtime == ONNX_RUNTIME
    copied = build.encoder_bytes if is_graph else 0
    how = "encoder copied, decoder linked, configs" if is_graph else "engines linked, configs"
    seconds = build.host.io_s(2 * copied) + ASSEMBLE_S
    return StepEstimate("assemble", EXPORT_HOST_BYTES, "derived", copied, seconds, how)


_ESTIMATES: Mapping[str, Callable[[_Build], StepEstimate]] = {
    "export-vision": _export_vision,
    "build-vision": _build_vision,
    "calibrate-llm": _calibrate_llm,
    "quantize-llm": _quantize_llm,
    "build-llm": _build_llm,
    "assemble": _assemble,
}


def _cores(count: int) -> str:
    return "1 core" if count == 1 else f"{count:,} cores"
