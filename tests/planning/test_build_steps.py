"""Host memory, disk and time of a build: beside what was measured of it (engines/EVIDENCE.md), and in their sums."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.planning.build_steps import (
    Host,
    StepEstimate,
    calibration_host_bytes,
    most_disk_bytes,
    step_estimates,
)
from nvlm_deploy.planning.known_models import PlannedModel

MIB, GIB = 1 << 20, 1 << 30
# an estimate that is further from a measurement is mended
MOST_TIMES = 1.5


def steps(model: PlannedModel, profile, host: Host | None = None) -> dict[str, StepEstimate]:
    return {step.name: step for step in step_estimates(model, profile, host)}


def is_near(estimate: float, measured: float) -> bool:
    return 1 / MOST_TIMES <= estimate / measured <= MOST_TIMES


@pytest.fixture
def two_layers(released) -> PlannedModel:
    """The decoder that tests/bench/bench_quantize.py writes, and no encoder."""
    spec = replace(
        released.spec,
        decoder=replace(released.spec.decoder, layers=2),
        vision=replace(released.spec.vision, layers=0),
    )
    return PlannedModel("two layers", spec, "derived")


def test_quantising_takes_the_memory_and_the_time_that_were_measured(two_layers, profile_with):
    """774 MiB and 19.1 s where a plain copy of its 15.2 GB took 17.0 s."""
    step = steps(two_layers, profile_with(), Host(disk_bytes_per_s=15.2e9 / 17.0))["quantize-llm"]
    assert is_near(step.host_bytes, 774 * MIB)
    assert is_near(step.seconds, 19.1)
    assert step.host_evidence == "measured"


def test_calibrating_a_layer_takes_the_memory_that_was_measured(two_layers):
    """2457 MiB, with the whole of one layer in BF16; of the encoder only the projector is in this model."""
    spec = replace(two_layers.spec, projector=replace(two_layers.spec.projector, hidden_size=1))
    assert is_near(calibration_host_bytes(replace(two_layers, spec=spec)), 2457 * MIB)


def test_calibrating_with_pictures_takes_the_encoder_in_float32_beside_its_own_weights(released):
    """Six full-width blocks, 2.73 GB in BF16, took 7.54 GiB at their peak."""
    six = replace(released, spec=replace(released.spec, vision=replace(released.spec.vision, layers=6)))
    assert is_near(calibration_host_bytes(six), 7.54 * GIB)
    assert calibration_host_bytes(released) > 30 * GIB


def test_exporting_takes_the_memory_and_the_time_that_were_measured(released, profile_with):
    """476 MiB and 129 s where a plain copy of 13.3 GB took 127 s."""
    step = steps(released, profile_with(), Host(disk_bytes_per_s=2 * 13.3e9 / 127))["export-vision"]
    assert is_near(step.host_bytes, 476 * MIB)
    assert is_near(step.seconds, 129)


@pytest.mark.parametrize(("precision", "measured_s", "measured_bytes"), [("bf16", 107, 13.0e9), ("fp8", 74, 14.4e9)])
def test_building_the_encoder_takes_what_was_measured(released, profile_with, precision, measured_s, measured_bytes):
    """TensorRT-RTX, 45 blocks; without the numerics gate, which is extrapolated."""
    profile = profile_with("l40s-latency", vision_precision=precision)
    one, two = (
        steps(released, profile.model_copy(update={"vision": profile.vision.model_copy(update={"gate_tiles": tiles})}))
        for tiles in (1, 2)
    )
    builder_s = 2 * one["build-vision"].seconds - two["build-vision"].seconds
    assert is_near(builder_s, measured_s)
    assert is_near(one["build-vision"].host_bytes, measured_bytes)


def test_more_cores_and_a_faster_disk_shorten_a_build(released, profile_with):
    slow, fast = (steps(released, profile_with(), host) for host in (Host(2, 1e9), Host(64, 4e9)))
    assert slow["calibrate-llm"].seconds > 10 * fast["calibrate-llm"].seconds
    assert slow["quantize-llm"].seconds == pytest.approx(4 * fast["quantize-llm"].seconds)
    assert "64 cores" in fast["calibrate-llm"].how


def test_scratch_is_counted_where_a_step_removes_it(released, profile_with):
    step = steps(released, profile_with())["calibrate-llm"]
    assert step.disk_bytes == 0
    # 512 pictures of 7 tiles as float32 embeddings alone
    assert step.scratch_bytes > 512 * 7 * 256 * 8192 * 4


@pytest.mark.parametrize("host", [(0, 1e9), (2, 0.0), (2, -1.0), (2, float("nan")), (2, float("inf"))])
def test_a_host_that_is_none_is_refused(host):
    with pytest.raises(NvlmError, match="is none"):
        Host(*host)


def test_the_disk_of_a_build_is_its_fullest_moment() -> None:
    def step(left: int, scratch: int) -> StepEstimate:
        return StepEstimate("any", 0, "derived", left, None, "", scratch)

    assert most_disk_bytes([step(10, 0), step(0, 50), step(30, 5)]) == 60
    assert most_disk_bytes([step(10, 0), step(0, 20), step(30, 5)]) == 45
    assert most_disk_bytes([]) == 0
