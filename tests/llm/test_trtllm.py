"""Writing the decoder as a TensorRT-LLM checkpoint: what is refused, and that a failure leaves nothing behind."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from nvlm_deploy.checkpoint.reader import Checkpoint
from nvlm_deploy.checkpoint.trtllm import read_checkpoint
from nvlm_deploy.checkpoint.trtllm_layout import FP8, FP8_PER_CHANNEL, SINGLE, Layout, Parallelism
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.llm.calibrate import CalibrationResult, calibrate
from nvlm_deploy.llm.observed import ObservedLayer
from nvlm_deploy.llm.trtllm import TrtllmExport, trtllm_checkpoint_from
from nvlm_deploy.model.decoder import PREFIX
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
        (Parallelism(1, 5), "pipeline_parallel 5 cannot share 4 layers", "legal: 1 to 4"),
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


@pytest.mark.parametrize("parallelism", [Parallelism(1), Parallelism(4), Parallelism(2, 2)])
def test_per_channel_codes_times_their_rows_scales_are_the_weights(
    random_case: Any, tmp_path: Path, parallelism: Parallelism
) -> None:
    """To half of e4m3's step, and every row uses its whole range."""
    checkpoint = trtllm_checkpoint_from(
        random_case.checkpoint,
        random_case.spec,
        tmp_path / "decoder",
        calibration=None,
        quant_algo=FP8_PER_CHANNEL,
        parallelism=parallelism,
    )
    merged, weights = checkpoint.merged(), random_case.weights()
    for index in range(random_case.spec.decoder.layers):
        for name, source in (("mlp.fc", "mlp.gate_proj"), ("attention.dense", "self_attn.o_proj")):
            module = f"transformer.layers.{index}.{name}"
            scales, codes = merged[f"{module}.per_channel_scale"], merged[f"{module}.weight"].float()
            weight = weights[f"model.layers.{index}.{source}.weight"].float()
            torch.testing.assert_close(codes * scales[:, None], weight, rtol=1 / 16, atol=2**-10 * scales.max().item())
            assert torch.equal(codes.abs().amax(dim=1), torch.full_like(scales, 448))
            assert torch.equal(scales, weight.abs().amax(dim=1) / 448)


@pytest.mark.parametrize("quant_algo", [FP8, FP8_PER_CHANNEL, None])
def test_an_fp8_kv_cache_never_has_a_scale_below_one(
    random_case: Any, random_calibration: CalibrationResult, tmp_path: Path, quant_algo: str | None
) -> None:
    """As ModelOpt's exporter; beyond that it is the larger amax of keys and values over 448 (contract A.7)."""
    amax = {**random_calibration.amax, "model.layers.1.self_attn.values": 896.0}
    checkpoint = trtllm_checkpoint_from(
        random_case.checkpoint,
        random_case.spec,
        tmp_path / "decoder",
        calibration=dataclasses.replace(random_calibration, amax=amax),
        quant_algo=quant_algo,
        kv_cache_quant_algo=FP8,
    )
    merged = checkpoint.merged()
    scales = [merged[f"transformer.layers.{n}.attention.kv_cache_scaling_factor"].tolist() for n in range(4)]
    assert scales == [[1.0], [2.0], [1.0], [1.0]]
    assert checkpoint.config["quantization"]["kv_cache_quant_algo"] == "FP8"


def test_keys_that_reach_far_are_warned_of(
    random_case: Any,
    random_calibration: CalibrationResult,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    amax = {**random_calibration.amax, "model.layers.1.self_attn.keys": 400.0}
    trtllm_checkpoint_from(
        random_case.checkpoint,
        random_case.spec,
        tmp_path / "decoder",
        calibration=dataclasses.replace(random_calibration, amax=amax),
        kv_cache_quant_algo=FP8,
    )
    assert "model.layers.1: keys or values reach 400: an FP8 KV cache may cost accuracy" in caplog.text


def test_without_samples_static_scales_are_refused_and_the_way_out_named(random_case: Any, tmp_path: Path) -> None:
    with pytest.raises(NvlmError, match="needs a calibration") as caught:
        trtllm_checkpoint_from(
            random_case.checkpoint, random_case.spec, tmp_path / "decoder", calibration=None, quant_algo=FP8
        )
    assert FP8_PER_CHANNEL in (caught.value.hint or "")
    assert list(tmp_path.iterdir()) == []


def test_data_free_says_what_it_gives_up(random_case: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    export = TrtllmExport(random_case.checkpoint, Layout(random_case.spec.decoder, FP8_PER_CHANNEL, SINGLE, FP8))
    export.write(tmp_path)
    time, cache = export.notes["data-free"]
    assert "scale for every token" in time and "Ada and Hopper only" in time
    assert "scale 1 unseen" in cache and "beyond 448" in cache
    assert time in caplog.text and cache in caplog.text
    merged = read_checkpoint(tmp_path).merged()
    assert merged["transformer.layers.0.attention.kv_cache_scaling_factor"].tolist() == [1.0]
    assert TrtllmExport(random_case.checkpoint, Layout(random_case.spec.decoder)).notes == {}, "BF16 gives up nothing"


def test_the_notes_of_a_calibrated_checkpoint_name_its_samples(
    random_case: Any, random_calibration: CalibrationResult
) -> None:
    export = TrtllmExport(random_case.checkpoint, Layout(random_case.spec.decoder, FP8), random_calibration)
    digest = random_calibration.samples_digest
    assert len(digest) == 64
    assert export.notes == {"calibration": {"samples": 3, "tokens": 50, "samples_digest": digest}}


def test_one_calibration_serves_every_recipe_and_split(
    random_case: Any, random_calibration: CalibrationResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ObservedLayer, "advance", None)
    codes = []
    for number, (quant_algo, kv_cache) in enumerate(
        (quant_algo, kv_cache) for quant_algo in (FP8, FP8_PER_CHANNEL, None) for kv_cache in (None, FP8)
    ):
        for parallelism in (Parallelism(2), Parallelism(1, 2)):
            checkpoint = trtllm_checkpoint_from(
                random_case.checkpoint,
                random_case.spec,
                tmp_path / f"{number}-{parallelism.tensor}",
                calibration=random_calibration,
                quant_algo=quant_algo,
                kv_cache_quant_algo=kv_cache,
                parallelism=parallelism,
            )
            codes.append(checkpoint.merged()["transformer.layers.3.mlp.proj.weight"].view(torch.uint8))
    assert all(torch.equal(one, other) for one, other in zip(codes[::4], codes[3::4], strict=True))


def test_progress_counts_bytes_written_and_read_back_up_to_the_whole(random_case: Any, tmp_path: Path) -> None:
    heard: list[tuple[int, int]] = []
    trtllm_checkpoint_from(
        random_case.checkpoint,
        random_case.spec,
        tmp_path / "decoder",
        calibration=None,
        on_progress=lambda _, done, total: heard.append((done, total)),
    )
    total = 2 * sum(weight.nbytes for weight in random_case.weights().values())
    assert heard[-1] == (total, total)
    assert [done for done, _ in heard] == sorted(done for done, _ in heard)


def test_a_misshapen_tensor_is_named_before_anything_is_written(random_case: Any, tmp_path: Path) -> None:
    narrower = dataclasses.replace(random_case.spec.decoder, intermediate_size=88)
    spec = dataclasses.replace(random_case.spec, decoder=narrower)
    with pytest.raises(NvlmError, match=r"0\.mlp\.gate_proj\.weight .* shape \[96, 64\], expected \[88, 64\]"):
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
    random_case: Any, spoilt: Any, tmp_path: Path, name: str
) -> None:
    output = tmp_path / "decoder"
    trtllm_checkpoint_from(random_case.checkpoint, random_case.spec, output, calibration=None)
    before = (output / "rank0.safetensors").read_bytes()
    holed = spoilt(random_case.checkpoint, PREFIX + name, float("nan"))
    with pytest.raises(NvlmError, match=f"{name} holds NaN"):
        trtllm_checkpoint_from(holed, random_case.spec, output, calibration=None)
    assert (output / "rank0.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["decoder"]


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.down_proj.weight", "lm_head.weight"])
def test_an_all_zero_weight_is_named_without_quantisation_too(
    random_case: Any, spoilt: Any, tmp_path: Path, name: str
) -> None:
    empty = spoilt(random_case.checkpoint, PREFIX + name, 0.0)
    with pytest.raises(NvlmError, match=f"{name} is all zeros"):
        trtllm_checkpoint_from(empty, random_case.spec, tmp_path / "decoder", calibration=None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("quant_algo", [FP8, FP8_PER_CHANNEL])
def test_an_all_zero_weight_is_named(
    random_case: Any, random_calibration: CalibrationResult, spoilt: Any, tmp_path: Path, quant_algo: str
) -> None:
    name = "language_model.model.layers.0.self_attn.v_proj.weight"
    with pytest.raises(NvlmError, match=f"{name} is all zeros"):
        trtllm_checkpoint_from(
            spoilt(random_case.checkpoint, name, 0.0),
            random_case.spec,
            tmp_path / "decoder",
            calibration=random_calibration if quant_algo == FP8 else None,
            quant_algo=quant_algo,
        )
    assert list(tmp_path.iterdir()) == []


def quantise(case: Any, calibration: CalibrationResult, folder: Path) -> None:
    trtllm_checkpoint_from(case.checkpoint, case.spec, folder / "decoder", calibration=calibration)
