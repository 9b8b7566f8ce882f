"""Calibration of the encoder, stage by stage."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nvlm_deploy.checkpoint.reader import Checkpoint
from nvlm_deploy.checkpoint.unfinished import PROGRESS_NAME
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.model.spec import spec_from_checkpoint
from nvlm_deploy.model.vision import vision_tower_from_checkpoint
from nvlm_deploy.vision import calibrate
from nvlm_deploy.vision.calibrate import TILES_PER_RUN, VisionCalibration, calibrate_vision
from nvlm_deploy.vision.calibration_state import CalibrationState
from nvlm_deploy.vision.heads import pruned, real_chunks
from nvlm_deploy.vision.numerics.compare import noise_tiles
from nvlm_deploy.vision.qdq import LINEAR_INPUTS
from nvlm_deploy.vision.stages import Stage

LAYERS = 4
STAGE_NAMES = ["patch_embedding", *(f"block.{index}" for index in range(LAYERS))]
STAGES = len(STAGE_NAMES)
QKV = "vision_model.encoder.layers.2.attn.qkv.weight"


@dataclasses.dataclass(frozen=True)
class SpoiltCheckpoint(Checkpoint):
    """A checkpoint one of whose tensors is filled with one value."""

    spoilt: str = ""
    value: float = 0.0

    @classmethod
    def of(cls, checkpoint: Checkpoint, spoilt: str, value: float) -> SpoiltCheckpoint:
        return cls(checkpoint.folder, checkpoint.config, checkpoint.infos, spoilt, value)

    def tensor(self, name: str) -> torch.Tensor:
        tensor = super().tensor(name)
        return torch.full_like(tensor, self.value) if name == self.spoilt else tensor


@pytest.fixture(scope="module")
def pictures() -> list[Any]:
    """More tiles than one run takes in the second, and in all of them together."""
    return [noise_tiles(count, 56, seed=count) for count in (1, TILES_PER_RUN + 3, 2)]


@pytest.fixture(scope="module")
def spec(random_checkpoint):
    return spec_from_checkpoint(random_checkpoint)


@pytest.fixture(scope="module")
def calibration(random_checkpoint, spec, pictures) -> VisionCalibration:
    return calibrate_vision(random_checkpoint, spec, pictures)


def test_every_amax_is_what_the_whole_tower_sees_over_all_tiles_at_once(random_checkpoint, spec, pictures, calibration):
    """Hooks on every linear and norm of one tower, not one stage at a time."""
    tower = vision_tower_from_checkpoint(random_checkpoint, spec)
    seen: dict[str, float] = {}
    for index, block in enumerate(tower.vision_model.blocks):
        for linear, point in LINEAR_INPUTS.items():
            name = f"block.{index}.{point}"
            block.get_submodule(linear).register_forward_pre_hook(
                lambda _, inputs, name=name: seen.update({name: inputs[0].abs().max().item()})
            )
        for norm in ("q_norm", "k_norm"):
            block.get_submodule(f"attn.{norm}").register_forward_hook(
                lambda _, __, x, name=f"block.{index}.{norm}": seen.update({name: x.abs().max().item()})
            )
        block.attn.qkv.register_forward_hook(
            lambda _, __, x, name=f"block.{index}.v": seen.update(
                {name: x[..., -x.shape[-1] // 3 :].abs().max().item()}
            )
        )
    with torch.inference_mode():
        tower(torch.from_numpy(np.concatenate(pictures)))
    assert len(seen) == 7 * LAYERS
    weights = {name for name in calibration.amax if name.startswith("vision_model.")}
    assert calibration.amax.keys() - weights == seen.keys()
    for name, amax in seen.items():
        assert calibration.amax[name] == pytest.approx(amax, rel=1e-5), name


def test_the_weights_of_the_linears_are_recorded_under_their_checkpoint_names(random_checkpoint, calibration):
    weights = {name: amax for name, amax in calibration.amax.items() if name.startswith("vision_model.")}
    assert len(weights) == LAYERS * len(LINEAR_INPUTS)
    assert all(amax == random_checkpoint.tensor(name).abs().max().item() for name, amax in weights.items())


def test_pictures_and_tiles_are_counted(calibration, pictures):
    assert (calibration.samples, calibration.tiles) == (3, sum(map(len, pictures)))


def test_more_pictures_never_lower_an_amax(random_checkpoint, spec, pictures, calibration):
    one = calibrate_vision(random_checkpoint, spec, pictures[:1])
    assert all(calibration.amax[name] >= one.amax[name] for name in one.amax)


def test_dummy_heads_of_zeros_change_no_amax(make_checkpoint, pictures):
    """The same real heads in a checkpoint without padding."""
    padded = make_checkpoint(vision_layers=2, decoder_layers=1)
    vision = spec_from_checkpoint(padded).vision

    def prune(weights) -> None:
        for name in [name for name in weights if name.startswith("vision_model.")]:
            weights[name] = torch.cat(list(real_chunks(padded, name, vision)))

    unpadded = make_checkpoint(vision_layers=2, decoder_layers=1, edit=prune)
    spec = spec_from_checkpoint(unpadded)
    assert spec.vision == pruned(vision)
    found = calibrate_vision(unpadded, spec, pictures).amax
    for name, amax in calibrate_vision(padded, spec_from_checkpoint(padded), pictures).amax.items():
        assert found[name] == pytest.approx(amax, rel=1e-5), name


class Killed(BaseException):
    pass


def kill(monkeypatch, stage: int, moment: str) -> None:
    """The run ends without a chance to tidy up when it opens the stage, in its midst, or before it is recorded."""
    name = STAGE_NAMES[stage - 1]
    moments = {
        "opening": (Stage, "from_checkpoint", lambda self, *_: self.name == name),
        "running": (Stage, "observed", lambda self, _, x: self.name == name and len(x) == TILES_PER_RUN),
        "recording": (CalibrationState, "record", lambda _, finished: finished.stages == stage),
    }
    owner, method, is_the_moment = moments[moment]
    original = getattr(owner, method)

    def dying(*args):
        if is_the_moment(*args):
            raise Killed
        return original(*args)

    monkeypatch.setattr(owner, method, dying)


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """Names of the stages whose weights are read, as it happens."""
    names: list[str] = []
    original = Stage.from_checkpoint

    def from_checkpoint(self, *args):
        names.append(self.name)
        return original(self, *args)

    monkeypatch.setattr(Stage, "from_checkpoint", from_checkpoint)
    return names


@pytest.mark.parametrize("moment", ["opening", "running", "recording"])
@pytest.mark.parametrize("stage", range(1, STAGES + 1))
def test_a_killed_run_resumes_at_the_stage_it_was_in_with_the_same_bytes(
    random_checkpoint, spec, pictures, calibration, tmp_path, monkeypatch, opened, stage, moment
):
    with monkeypatch.context() as patched:
        kill(patched, stage, moment)
        with pytest.raises(Killed):
            calibrate_vision(random_checkpoint, spec, pictures, work_folder=tmp_path / "work")
    opened.clear()
    resumed = calibrate_vision(random_checkpoint, spec, pictures, work_folder=tmp_path / "work")
    resumed.save(tmp_path / "resumed.json")
    calibration.save(tmp_path / "whole.json")
    assert (tmp_path / "resumed.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert opened == STAGE_NAMES[stage - 1 :]


@pytest.mark.parametrize("damage", ["zeros", "cut", "gone", "amax"])
def test_hidden_states_that_are_not_as_they_were_written_are_computed_again(
    random_checkpoint, spec, pictures, calibration, tmp_path, monkeypatch, opened, damage
):
    with monkeypatch.context() as patched:
        kill(patched, 3, "opening")
        with pytest.raises(Killed):
            calibrate_vision(random_checkpoint, spec, pictures, work_folder=tmp_path)
    spill, progress = tmp_path / "hidden_states.2.safetensors", tmp_path / PROGRESS_NAME
    content = spill.read_bytes()
    spill.write_bytes({"zeros": content[:-4000] + bytes(4000), "cut": content[:-4000]}.get(damage, content))
    if damage == "gone":
        spill.unlink()
    elif damage == "amax":
        progress.write_text(progress.read_text().replace('"block.0.norm1": ', '"block.0.norm1": 1'))
    opened.clear()
    assert calibrate_vision(random_checkpoint, spec, pictures, work_folder=tmp_path) == calibration
    assert opened[-STAGES:] == STAGE_NAMES
    assert [path.name for path in tmp_path.iterdir()] == [PROGRESS_NAME]


def test_a_finished_run_keeps_no_hidden_states_and_is_not_computed_again(
    random_checkpoint, spec, pictures, calibration, tmp_path, monkeypatch
):
    calibrate_vision(random_checkpoint, spec, pictures, work_folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [PROGRESS_NAME]
    monkeypatch.setattr(calibrate, "_ObservedStage", None)
    assert calibrate_vision(random_checkpoint, spec, pictures, work_folder=tmp_path) == calibration


def test_what_a_killed_run_had_half_written_is_removed(random_checkpoint, spec, pictures, tmp_path):
    for name in (".partial-17-hidden_states.2.safetensors", "hidden_states.3.safetensors"):
        (tmp_path / name).write_bytes(b"half")
    calibrate_vision(random_checkpoint, spec, pictures, work_folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [PROGRESS_NAME]


def test_one_stages_hidden_states_lie_in_the_work_folder_at_a_time(
    random_checkpoint, spec, pictures, tmp_path, monkeypatch
):
    left: list[list[str]] = []
    original = CalibrationState.record

    def record(self, finished) -> None:
        original(self, finished)
        left.append(sorted(path.name for path in tmp_path.iterdir()))

    monkeypatch.setattr(CalibrationState, "record", record)
    calibrate_vision(random_checkpoint, spec, pictures, work_folder=tmp_path)
    assert left == [[f"hidden_states.{n}.safetensors", PROGRESS_NAME] for n in range(1, STAGES)] + [[PROGRESS_NAME]]


@pytest.mark.parametrize("change", ["pixel", "weight", "epsilon", "damage"])
def test_a_state_of_something_else_is_not_used(random_checkpoint, spec, pictures, tmp_path, opened, change):
    calibrate_vision(random_checkpoint, spec, pictures, work_folder=tmp_path)
    checkpoint = random_checkpoint
    if change == "pixel":
        pictures = [pictures[0].copy(), *pictures[1:]]
        pictures[0][0, 5, 5, 0] ^= 1
    elif change == "weight":
        checkpoint = SpoiltCheckpoint.of(checkpoint, "vision_model.encoder.layers.3.ls2", 0.5)
    elif change == "epsilon":
        spec = dataclasses.replace(spec, vision=dataclasses.replace(spec.vision, norm_epsilon=0.1))
    else:
        (tmp_path / PROGRESS_NAME).write_text('{"digest": ')
    opened.clear()
    found = calibrate_vision(checkpoint, spec, pictures, work_folder=tmp_path)
    assert opened == STAGE_NAMES
    assert found == calibrate_vision(checkpoint, spec, pictures)


def test_progress_is_told_picture_by_picture_up_to_the_end_also_after_a_kill(
    random_checkpoint, spec, pictures, tmp_path, monkeypatch
):
    told: list[tuple[str, int, int]] = []
    with monkeypatch.context() as patched:
        kill(patched, 3, "recording")
        with pytest.raises(Killed):
            calibrate_vision(
                random_checkpoint, spec, pictures, work_folder=tmp_path, on_progress=lambda *args: told.append(args)
            )
    assert len(told) == 3 * len(pictures)
    calibrate_vision(
        random_checkpoint, spec, pictures, work_folder=tmp_path, on_progress=lambda *args: told.append(args)
    )
    again = told[3 * len(pictures) :]
    assert [name for name, _, _ in again] == [f"calibrate vision: block.{n}" for n in (1, 2, 3) for _ in pictures]
    total = STAGES * sum(picture.nbytes for picture in pictures)
    assert again[-1][1:] == (total, total)
    assert [done for _, done, _ in again] == sorted(done for _, done, _ in again)


def test_a_saved_calibration_comes_back_bit_for_bit(calibration, tmp_path):
    calibration.save(tmp_path / "calibration.json")
    assert VisionCalibration.load(tmp_path / "calibration.json") == calibration


@pytest.mark.parametrize("text", ["[]", "{}", '{"amax": 3, "samples": 1, "tiles": 1}', "{"])
def test_a_file_that_is_no_calibration_is_refused(tmp_path: Path, text):
    (tmp_path / "calibration.json").write_text(text)
    with pytest.raises(NvlmError, match=r"calibration\.json"):
        VisionCalibration.load(tmp_path / "calibration.json")


def test_without_pictures_there_is_nothing_to_calibrate(random_checkpoint, spec):
    with pytest.raises(NvlmError, match="no calibration pictures"):
        calibrate_vision(random_checkpoint, spec, [])


@pytest.mark.parametrize(
    "picture",
    [
        np.zeros((1, 57, 56, 3), np.uint8),
        np.zeros((0, 56, 56, 3), np.uint8),
        np.zeros((56, 56, 3), np.uint8),
        np.zeros((1, 56, 56, 3), np.float32),
    ],
)
def test_a_picture_of_the_wrong_shape_or_type_is_named_with_the_right_one(random_checkpoint, spec, pictures, picture):
    with pytest.raises(NvlmError, match=r"picture 1 is .*expected uint8 \['1 or more', 56, 56, 3\]"):
        calibrate_vision(random_checkpoint, spec, [pictures[0], picture])


@pytest.mark.parametrize(
    ("value", "complaint"), [(0.0, "is all zeros"), (float("nan"), "NaN"), (float("-inf"), "infinity")]
)
def test_a_weight_that_cannot_be_right_is_named(random_checkpoint, spec, pictures, value, complaint):
    with pytest.raises(NvlmError, match=complaint) as caught:
        calibrate_vision(SpoiltCheckpoint.of(random_checkpoint, QKV, value), spec, pictures)
    assert QKV in str(caught.value)


def test_an_activation_that_overflows_is_named_with_its_point_and_picture(random_checkpoint, spec, pictures):
    steep = SpoiltCheckpoint.of(random_checkpoint, "vision_model.encoder.layers.1.norm2.weight", 3e38)
    with pytest.raises(NvlmError, match=r"block\.1\.norm2 holds NaN or infinity in calibration picture 0"):
        calibrate_vision(steep, spec, pictures)


def test_an_overflow_behind_the_last_linear_is_noticed_too(random_checkpoint, spec, pictures):
    steep = SpoiltCheckpoint.of(random_checkpoint, "vision_model.encoder.layers.3.ls2", 3e38)
    with pytest.raises(NvlmError, match=r"block\.3 holds NaN or infinity in calibration picture 0"):
        calibrate_vision(steep, spec, pictures)


def test_an_input_that_is_always_zero_is_named(random_checkpoint, spec, pictures):
    silent = SpoiltCheckpoint.of(random_checkpoint, "vision_model.encoder.layers.2.mlp.fc1.bias", -1e5)
    with pytest.raises(NvlmError, match=r"block\.2\.gelu was zero in all calibration pictures"):
        calibrate_vision(silent, spec, pictures)
