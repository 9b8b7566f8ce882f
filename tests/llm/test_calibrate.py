"""Calibration of the decoder, layer by layer."""

from __future__ import annotations

import dataclasses
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.llm.calibrate import CalibrationResult, calibrate
from nvlm_deploy.llm.observed import FUSED_LINEARS, ObservedLayer
from nvlm_deploy.model.decoder import decoder_from_checkpoint


def test_the_amax_of_every_layer_is_what_the_whole_decoder_sees(case: Any, calibration: CalibrationResult) -> None:
    """Not one layer at a time, and by hooks on every linear rather than on one of a group."""
    decoder = decoder_from_checkpoint(case.checkpoint, case.spec)
    seen: dict[str, float] = {}
    for name, module in decoder.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(
                lambda _, inputs, name=name: seen.update({name: max(seen.get(name, 0), inputs[0].abs().max().item())})
            )
    for sample in case.samples:
        decoder(sample[None])
    for index in range(case.spec.decoder.layers):
        for group in FUSED_LINEARS:
            amax = calibration.amax[f"model.layers.{index}.{group[0]}.input"]
            for linear in group:
                assert seen[f"model.layers.{index}.{linear}"] == pytest.approx(amax, rel=1e-5)


def test_keys_are_recorded_as_the_cache_holds_them(random_case: Any) -> None:
    calibration = calibrate(random_case.checkpoint, random_case.spec, random_case.samples)
    peer = random_case.peer()
    largest = 0.0
    for sample in random_case.samples:
        cache = peer(inputs_embeds=sample[None], use_cache=True).past_key_values
        largest = max(largest, cache.layers[1].keys.abs().max().item())
    assert calibration.amax["model.layers.1.self_attn.keys"] == pytest.approx(largest, rel=1e-5)


def test_one_layer_is_in_memory_at_a_time(random_case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[ObservedLayer]] = []
    original = ObservedLayer.__init__

    def init(self: ObservedLayer, *args: Any) -> None:
        assert [layer for layer in alive if layer() is not None] == []
        alive.append(weakref.ref(self))
        original(self, *args)

    monkeypatch.setattr(ObservedLayer, "__init__", init)
    calibrate(random_case.checkpoint, random_case.spec, random_case.samples)
    assert len(alive) == 4


def test_calibrating_twice_gives_the_same_numbers(random_case: Any, tmp_path: Path) -> None:
    first, second = (calibrate(random_case.checkpoint, random_case.spec, random_case.samples) for _ in range(2))
    assert first == second


def test_a_calibration_says_which_samples_it_is_of(random_case: Any) -> None:
    samples = random_case.samples
    digests = {
        calibrate(random_case.checkpoint, random_case.spec, those).samples_digest
        for those in (samples, [*samples], samples[:2], [samples[1], samples[0], samples[2]])
    }
    assert len(digests) == 3


def test_more_samples_never_lower_an_amax(random_case: Any) -> None:
    one = calibrate(random_case.checkpoint, random_case.spec, random_case.samples[:1])
    all_of_them = calibrate(random_case.checkpoint, random_case.spec, random_case.samples)
    assert all(all_of_them.amax[name] >= one.amax[name] for name in one.amax)
    assert all_of_them.tokens == sum(len(sample) for sample in random_case.samples)


def test_a_saved_calibration_comes_back_bit_for_bit(calibration: CalibrationResult, tmp_path: Path) -> None:
    calibration.save(tmp_path / "calibration.json")
    assert CalibrationResult.load(tmp_path / "calibration.json") == calibration


def test_a_saved_calibration_with_another_digit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    CalibrationResult({"model.layers.0.mlp.up_proj.input": 2.5}, 1, 9).save(path)
    path.write_text(path.read_text().replace("2.5", "25"))
    with pytest.raises(NvlmError, match=r"calibration\.json is not a calibration, or is damaged") as refusal:
        CalibrationResult.load(path)
    assert refusal.value.hint == "calibrate again"


@pytest.mark.parametrize("text", ["[]", "{}", '{"amax": 3, "samples": 1, "tokens": 1, "samples_digest": ""}', "{"])
def test_a_file_that_is_no_calibration_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "calibration.json").write_text(text)
    with pytest.raises(NvlmError, match=r"calibration\.json"):
        CalibrationResult.load(tmp_path / "calibration.json")


def test_without_samples_there_is_nothing_to_calibrate(random_case: Any) -> None:
    with pytest.raises(NvlmError, match="no calibration samples"):
        calibrate(random_case.checkpoint, random_case.spec, [])


@pytest.mark.parametrize("shape", [(5, 63), (0, 64), (129, 64), (64,), (1, 5, 64)])
def test_a_sample_of_the_wrong_shape_is_named_with_the_right_one(random_case: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(NvlmError, match=r"sample 1 has shape .* expected \[1 to 128, 64\]"):
        calibrate(random_case.checkpoint, random_case.spec, [random_case.samples[0], torch.ones(shape)])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_sample_that_is_not_finite_is_named(random_case: Any, value: float) -> None:
    bad = random_case.samples[1].clone()
    bad[3, 7] = value
    with pytest.raises(NvlmError, match="sample 1 holds NaN or infinity"):
        calibrate(random_case.checkpoint, random_case.spec, [random_case.samples[0], bad])


@pytest.mark.parametrize("layer", [1, 3])
def test_an_activation_that_overflows_is_named_with_its_sample(random_case: Any, spoilt: Any, layer: int) -> None:
    """float16 ends at 65504; the last layer's overflow reaches no further linear."""
    name = f"model.layers.{layer}.mlp.down_proj.weight"
    steep = spoilt(random_case.checkpoint, f"language_model.{name}", 60000.0)
    with pytest.raises(
        NvlmError, match=rf"model\.layers\.{layer}\.output holds NaN or infinity in calibration sample 0"
    ):
        calibrate(steep, random_case.spec, random_case.samples, dtype=torch.float16)


def test_an_input_that_is_always_zero_is_named(random_case: Any) -> None:
    with pytest.raises(NvlmError, match=r"model\.layers\.0\.self_attn\.q_proj\.input was zero in all samples"):
        calibrate(random_case.checkpoint, random_case.spec, [torch.zeros(3, 64)])


@pytest.mark.parametrize(
    ("value", "complaint"), [(0.0, "is all zeros"), (float("nan"), "NaN"), (float("-inf"), "infinity")]
)
@pytest.mark.parametrize("weight", ["mlp.up_proj.weight", "input_layernorm.weight"])
def test_a_weight_that_cannot_be_right_is_named(
    random_case: Any, spoilt: Any, value: float, complaint: str, weight: str
) -> None:
    name = f"language_model.model.layers.2.{weight}"
    holed = spoilt(random_case.checkpoint, name, value)
    with pytest.raises(NvlmError, match=complaint) as caught:
        calibrate(holed, random_case.spec, random_case.samples)
    assert name in str(caught.value)


def test_a_missing_layer_is_named(random_case: Any) -> None:
    deeper = dataclasses.replace(random_case.spec.decoder, layers=5)
    with pytest.raises(NvlmError, match=r"language_model\.model\.layers\.4"):
        calibrate(random_case.checkpoint, dataclasses.replace(random_case.spec, decoder=deeper), random_case.samples)
