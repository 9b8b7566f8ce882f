"""Writing the decoder as a TensorRT-LLM checkpoint: what is refused, and that a failure leaves nothing behind."""

from __future__ import annotations

import dataclasses
import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from nvlm_deploy.checkpoint.reader import Checkpoint
from nvlm_deploy.checkpoint.stream import TensorStream
from nvlm_deploy.checkpoint.trtllm import read_checkpoint
from nvlm_deploy.checkpoint.trtllm_layout import Parallelism
from nvlm_deploy.errors import MachineError, NvlmError
from nvlm_deploy.llm.calibrate import CalibrationResult, calibrate
from nvlm_deploy.llm.trtllm import trtllm_checkpoint_from
from nvlm_deploy.model.fp8 import to_e4m3


@pytest.fixture(scope="module")
def random_calibration(random_case: Any) -> CalibrationResult:
    return calibrate(random_case.checkpoint, random_case.spec, random_case.samples)


def test_every_split_holds_the_same_decoder(
    random_case: Any, random_calibration: CalibrationResult, tmp_path: Path
) -> None:
    merged = []
    for parallelism in (Parallelism(1), Parallelism(2), Parallelism(8), Parallelism(1, 3), Parallelism(4, 4)):
        output = tmp_path / f"{parallelism.tensor}x{parallelism.pipeline}"
        trtllm_checkpoint_from(
            random_case.checkpoint, random_case.spec, output, calibration=random_calibration, parallelism=parallelism
        )
        merged.append(read_checkpoint(output).merged())
    for other in merged[1:]:
        assert list(other) == list(merged[0])
        assert all(
            torch.equal(value.view(torch.uint8), merged[0][name].view(torch.uint8)) for name, value in other.items()
        )


def test_writing_twice_gives_the_same_files(
    random_case: Any, random_calibration: CalibrationResult, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        trtllm_checkpoint_from(
            random_case.checkpoint, random_case.spec, tmp_path / name, calibration=random_calibration
        )
    for file in ("config.json", "rank0.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_fusing_gate_and_up_as_tensorrt_llm_does_changes_no_code(
    random_case: Any, random_calibration: CalibrationResult, tmp_path: Path
) -> None:
    """It dequantises in BF16 and requantises with the larger scale (contract A.6); the scales are shared."""
    checkpoint = trtllm_checkpoint_from(
        random_case.checkpoint, random_case.spec, tmp_path / "decoder", calibration=random_calibration
    )
    merged = checkpoint.merged()
    for index in range(random_case.spec.decoder.layers):
        for which in ("fc", "gate"):
            codes = merged[f"transformer.layers.{index}.mlp.{which}.weight"]
            scales = [
                merged[f"transformer.layers.{index}.mlp.{side}.weights_scaling_factor"] for side in ("fc", "gate")
            ]
            assert torch.equal(*scales)
            dequantised = codes.to(torch.bfloat16) * scales[0].to(torch.bfloat16)
            assert torch.equal(to_e4m3(dequantised, scales[0].to(torch.bfloat16)).float(), codes.float())


@pytest.mark.parametrize(
    ("parallelism", "complaint", "legal"),
    [
        (Parallelism(3), "tensor_parallel 3 cannot share 8 heads, 2 key/value heads", "legal: 1, 2, 4, 8"),
        (Parallelism(0), "tensor_parallel 0", "legal: 1, 2, 4, 8"),
        (Parallelism(1, 5), "pipeline_parallel 5 cannot share 4 layers", "legal: 1, 2, 3, 4"),
    ],
)
def test_an_illegal_split_is_refused_and_the_legal_ones_named(
    random_case: Any, tmp_path: Path, parallelism: Parallelism, complaint: str, legal: str
) -> None:
    with pytest.raises(NvlmError, match=complaint) as caught:
        trtllm_checkpoint_from(
            random_case.checkpoint, random_case.spec, tmp_path / "d", calibration=None, parallelism=parallelism
        )
    assert caught.value.hint == legal
    assert list(tmp_path.iterdir()) == []


def test_a_misshapen_tensor_is_named_before_anything_is_written(random_case: Any, tmp_path: Path) -> None:
    narrower = dataclasses.replace(random_case.spec.decoder, intermediate_size=88)
    spec = dataclasses.replace(random_case.spec, decoder=narrower)
    with pytest.raises(NvlmError, match=r"layers\.0\.mlp\.gate_proj\.weight has shape \[96, 64\], expected \[88, 64\]"):
        trtllm_checkpoint_from(random_case.checkpoint, spec, tmp_path / "decoder", calibration=None)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_without_lm_head_is_refused(random_case: Any, tmp_path: Path) -> None:
    infos = {name: info for name, info in random_case.checkpoint.infos.items() if "lm_head" not in name}
    headless = Checkpoint(random_case.checkpoint.folder, random_case.checkpoint.config, infos)
    with pytest.raises(NvlmError, match=r"no tensor 'language_model\.lm_head\.weight'"):
        trtllm_checkpoint_from(headless, random_case.spec, tmp_path / "untied", calibration=None)


def test_a_calibration_of_another_checkpoint_is_refused(
    random_case: Any, random_calibration: CalibrationResult, tmp_path: Path
) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    amax = {**random_calibration.amax, name: random_calibration.amax[name] * 1.01}
    with pytest.raises(NvlmError, match=f"{name} has amax .* of another checkpoint"):
        quantise(random_case, dataclasses.replace(random_calibration, amax=amax), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_calibration_that_lacks_a_layer_is_refused(
    random_case: Any, random_calibration: CalibrationResult, tmp_path: Path
) -> None:
    amax = {name: value for name, value in random_calibration.amax.items() if "layers.3.mlp.down" not in name}
    with pytest.raises(NvlmError, match=r"no amax of model\.layers\.3\.mlp\.down_proj"):
        quantise(random_case, dataclasses.replace(random_calibration, amax=amax), tmp_path)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), -1.0])
def test_an_amax_that_is_no_magnitude_is_refused(
    random_case: Any, random_calibration: CalibrationResult, tmp_path: Path, value: float
) -> None:
    amax = {**random_calibration.amax, "model.layers.1.mlp.gate_proj.input": value}
    with pytest.raises(NvlmError, match=r"amax of model\.layers\.1\.mlp\.gate_proj\.input is"):
        quantise(random_case, dataclasses.replace(random_calibration, amax=amax), tmp_path)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.self_attn.k_proj.bias", "lm_head.weight"])
def test_nan_in_any_tensor_is_named_and_leaves_the_former_checkpoint(
    random_case: Any, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "decoder"
    trtllm_checkpoint_from(random_case.checkpoint, random_case.spec, output, calibration=None)
    before = (output / "rank0.safetensors").read_bytes()
    honest = Checkpoint.tensor

    def spoilt(self: Checkpoint, asked: str) -> torch.Tensor:
        tensor = honest(self, asked)
        return tensor * float("nan") if asked.endswith(name) else tensor

    monkeypatch.setattr(Checkpoint, "tensor", spoilt)
    with pytest.raises(NvlmError, match=f"{name} holds NaN"):
        trtllm_checkpoint_from(random_case.checkpoint, random_case.spec, output, calibration=None)
    assert (output / "rank0.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["decoder"]


def test_a_full_disk_is_the_machines_fault_and_leaves_nothing(
    random_case: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TensorStream, "put", full)
    with pytest.raises(MachineError, match="the disk is full"):
        trtllm_checkpoint_from(random_case.checkpoint, random_case.spec, tmp_path / "decoder", calibration=None)
    assert list(tmp_path.iterdir()) == []


def test_an_all_zero_weight_is_named(
    random_case: Any, random_calibration: CalibrationResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Checkpoint.tensor
    monkeypatch.setattr(Checkpoint, "tensor", lambda self, name: honest(self, name) * ("v_proj.weight" not in name))
    with pytest.raises(NvlmError, match=r"layers\.0\.self_attn\.v_proj\.weight is all zeros"):
        quantise(random_case, random_calibration, tmp_path)


def quantise(case: Any, calibration: CalibrationResult, folder: Path) -> None:
    trtllm_checkpoint_from(case.checkpoint, case.spec, folder / "decoder", calibration=calibration)
