"""What each step of a build takes: host memory, disk, and time by a stated disk. Rules, and where each comes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from nvlm_deploy.llm.engine import rank_memory_bytes
from nvlm_deploy.planning.known_models import PlannedModel
from nvlm_deploy.planning.roofline import EFFICIENCY, linear_parameters
from nvlm_deploy.planning.serving import Workload
from nvlm_deploy.planning.weights import decoder_bytes, layout_of, vision_engine_bytes
from nvlm_deploy.profile import Profile
from nvlm_deploy.recipe import Recipe
from nvlm_deploy.sku import Sku, load_sku
from nvlm_deploy.steps.order import steps_of_build

# a local NVMe drive, reading or writing
DISK_BYTES_PER_S = 1e9
# peak of the export with the released shapes (tests/bench/bench_vision_export.py --full), rounded up
EXPORT_HOST_BYTES = 512 << 20
# TensorRT-RTX's own memory for all 45 blocks: 13.0 GB for BF16, 14.4 GB for FP8 (engines/EVIDENCE.md)
BUILDER_HOST_BYTES = 2 << 30
# TensorRT-RTX built all 45 blocks in 47 to 107 s for 12.3 GB of weights (engines/EVIDENCE.md)
BUILDER_S_PER_GB = 10.0
# the numerics gate on two cores: half an hour a tile with the released shapes (engines/EVIDENCE.md, extrapolated)
GATE_S_PER_TILE_AND_PARAMETER = 1800 / 6.16e9
# layers in BF16 beside their products, libraries (llm/calibrate.py holds one layer and 1 GiB of hidden states)
CALIBRATE_HOST_BYTES = 3 << 30
QUANTIZE_HOST_BYTES = 2 << 30
ASSEMBLE_S = 5.0


@dataclass(frozen=True)
class StepEstimate:
    """One step: host memory at its peak, what it leaves on the disk, time. Disk and time are derived.

    `seconds` is None where nothing is known to estimate by; `how` says what the time is made of; `host_evidence` is
    measured where a run of ours with the released shapes gave the number, or its rule.
    """

    name: str
    host_bytes: int
    host_evidence: str
    disk_bytes: int
    seconds: float | None
    how: str


@dataclass(frozen=True)
class _Build:
    model: PlannedModel
    profile: Profile
    sku: Sku

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


def step_estimates(model: PlannedModel, profile: Profile) -> tuple[StepEstimate, ...]:
    """The steps of `nvlm build` with this profile, in order."""
    build = _Build(model, profile, load_sku(profile.sku))
    return tuple(_ESTIMATES[name](build) for name in steps_of_build(Recipe(Path(), profile, Path())))


def _export_vision(build: _Build) -> StepEstimate:
    moved = 2 * build.encoder_parameters + 2 * build.encoder_bytes
    return StepEstimate(
        "export-vision", EXPORT_HOST_BYTES, "measured", build.encoder_bytes, _io_s(moved), "read, written, read back"
    )


def _build_vision(build: _Build) -> StepEstimate:
    host = 2 * build.encoder_parameters + BUILDER_HOST_BYTES
    gate_s = build.profile.vision.gate_tiles * build.encoder_parameters * GATE_S_PER_TILE_AND_PARAMETER
    builder_s = build.encoder_bytes / 1e9 * BUILDER_S_PER_GB
    how = f"numerics gate on 2 cores {gate_s / 60:.0f} min, builder {builder_s / 60:.0f} min"
    return StepEstimate("build-vision", host, "measured", build.encoder_bytes, gate_s + builder_s, how)


def _calibrate_llm(build: _Build) -> StepEstimate:
    """The encoder runs on the CPU in float32; layers run one at a time, on a GPU where there is one."""
    layer = 2 * linear_parameters(build.model.spec.decoder) // build.model.spec.decoder.layers
    encoder = 2 * 2 * build.encoder_parameters
    host = max(CALIBRATE_HOST_BYTES + 2 * layer, encoder + CALIBRATE_HOST_BYTES)
    tokens = build.profile.calibration.samples * Workload().prompt_tokens(build.model.spec)
    rate = build.sku.dense_tflops.get("bf16", 0) * 1e12 * EFFICIENCY.sixteen_bit
    hidden = 2 * tokens * build.model.spec.decoder.hidden_size
    if not rate:
        return StepEstimate("calibrate-llm", host, "derived", 2 * hidden, None, "this CPU's speed is not known")
    seconds = _io_s(build.decoder_checkpoint_bytes) + 2 * linear_parameters(build.model.spec.decoder) * tokens / rate
    how = f"weights read, {tokens:,} tokens on one GPU; the encoder's time on the CPU is not in it"
    return StepEstimate("calibrate-llm", host, "derived", 2 * hidden, seconds, how)


def _quantize_llm(build: _Build) -> StepEstimate:
    moved = build.decoder_checkpoint_bytes + 2 * build.rank_bytes
    return StepEstimate(
        "quantize-llm", QUANTIZE_HOST_BYTES, "derived", build.rank_bytes, _io_s(moved), "read, written, read back"
    )


def _build_llm(build: _Build) -> StepEstimate:
    layout = layout_of(build.model.spec, build.profile)
    at_once = build.profile.decoder.build_at_once or 1
    host, ranks = rank_memory_bytes(layout) * at_once, layout.parallelism.world_size
    seconds = -(-ranks // at_once) * (_io_s(3 * build.rank_bytes // ranks) + 120)
    how = f"{ranks} rank(s), {at_once} at once: weights moved three times, 2 min of kernel timing each (assumed)"
    return StepEstimate("build-llm", host, "derived", build.rank_bytes, seconds, how)


def _assemble(build: _Build) -> StepEstimate:
    seconds = _io_s(2 * build.encoder_bytes) + ASSEMBLE_S
    how = "encoder copied, decoder linked, configs"
    return StepEstimate("assemble", EXPORT_HOST_BYTES, "derived", build.encoder_bytes, seconds, how)


_ESTIMATES: Mapping[str, Callable[[_Build], StepEstimate]] = {
    "export-vision": _export_vision,
    "build-vision": _build_vision,
    "calibrate-llm": _calibrate_llm,
    "quantize-llm": _quantize_llm,
    "build-llm": _build_llm,
    "assemble": _assemble,
}


def _io_s(moved_bytes: float) -> float:
    return moved_bytes / DISK_BYTES_PER_S
