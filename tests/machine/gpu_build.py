"""A GPU profile of the small model's size, and a machine on which it builds: fakes of all that needs a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from nvlm_deploy.profile import CalibrationChoice, Profile, ServingChoice, VisionChoice, load_profile

FAKES = Path(__file__).parents[1] / "llm" / "fakes"
if str(FAKES) not in sys.path:
    sys.path.insert(0, str(FAKES))

from fake_container import FakeContainer  # noqa: E402
from fake_nvidia_smi import FakeNvidiaSmi, install  # noqa: E402

# what Triton would find in the container, for `--backend-directory`
BACKEND = FAKES / "backends" / "tensorrtllm"
# the encoder where no plan runs
ON_CPU = VisionChoice(runtime="onnxruntime", precision="fp32", gate_tiles=1, max_tiles_per_run=8)
VERSIONS = {"tensorrt_llm": "1.2.1", "tensorrt": "10.14.1.48"}


def gpu_profile(**decoder: object) -> Profile:
    """Two L40S, as small as the small model; data-free, so that nothing has to be calibrated."""
    profile = load_profile("l40s-latency")
    choices = {
        "quantization": "fp8_per_channel",
        "tensor_parallel": 2,
        "pipeline_parallel": 1,
        "max_batch_size": 4,
        "max_seq_len": 512,
        **decoder,
    }
    changes = {
        "name": "two-l40s",
        "decoder": profile.decoder.model_copy(update=choices),
        "vision": profile.vision.model_copy(update={"gate_tiles": 1}),
        "calibration": CalibrationChoice(samples=0),
        "serving": ServingChoice(max_images=2, default_max_tokens=64),
    }
    return profile.model_copy(update=changes)


def two_l40s(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "container").mkdir()
    FakeContainer(folder / "container", monkeypatch)
    FakeNvidiaSmi(folder / "bin", monkeypatch).machine("L40S", "L40S")
    install(folder / "installed", monkeypatch, **VERSIONS)
