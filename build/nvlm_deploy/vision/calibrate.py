"""Calibration of the encoder: the largest magnitudes that reach what FP8 would quantise, found one stage at a time.

One stage's weights are in memory; the tiles' hidden states flow from stage to stage in float32, so that an amax is
never that of an already quantised input. The projector is not run: nothing in it is quantised (quantize.py).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from nvlm_deploy.checkpoint.reader import Checkpoint
from nvlm_deploy.checkpoint.soundness import SoundChunks, magnitude
from nvlm_deploy.checkpoint.unfinished import DamagedStatesError, read_sealed_json, write_sealed_json
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.model.device import compute_device
from nvlm_deploy.model.spec import ModelSpec
from nvlm_deploy.progress import Progress, silent
from nvlm_deploy.scratch import scratch_folder
from nvlm_deploy.vision.calibration_state import CalibrationState, Finished, calibration_digest
from nvlm_deploy.vision.qdq import LINEAR_INPUTS
from nvlm_deploy.vision.stages import Stage, stages

log = logging.getLogger(__name__)

Tiles = npt.NDArray[np.uint8]

# what attention multiplies; `v` is the last third of the point `qkv`
ATTENTION_INPUTS = ("q_norm", "k_norm", "v")

# A tile of the released model holds 270 MB of float32 points while it is in a block
TILES_PER_RUN = 4


@dataclass(frozen=True)
class VisionCalibration:
    """Amax by name: of points, `block.N.` and one of LINEAR_INPUTS' or ATTENTION_INPUTS, and of linears' weights by
    their names in the checkpoint.
    """

    amax: Mapping[str, float]
    samples: int
    tiles: int

    def save(self, path: Path) -> None:
        """As JSON; a float32 survives the decimal notation bit for bit."""
        write_sealed_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> VisionCalibration:
        """Raises NvlmError for a file that `save` did not write, or with another byte."""
        try:
            return cls(**read_sealed_json(path) or {})
        except TypeError:
            raise NvlmError(f"{path} is not a vision calibration, or is damaged", hint="calibrate again") from None

    @classmethod
    def saved(cls, path: Path) -> VisionCalibration | None:
        """As `load`; None where that would raise: a killed run had not got so far."""
        try:
            return cls.load(path)
        except NvlmError:
            return None


def calibrate_vision(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    pictures: Sequence[Tiles],
    *,
    work_folder: Path | None = None,
    on_progress: Progress = silent,
) -> VisionCalibration:
    """Run every picture's tiles, uint8 [n, S, S, 3], through every block and keep the amax.

    Hidden states between stages (13 MB a tile at full size, twice while a stage runs) lie in `work_folder`, or else in
    a temporary one. A run that was killed resumes there at the stage it was in, with the same result; a state of other
    weights or pictures, computed on another kind of device, or with other bytes than were written, is not used. On a
    GPU when there is one. Dummy heads are included: those that are zero, and so left out of the graph, add nothing to
    an amax.

    Raises NvlmError for weights or activations that are not finite and for linears or inputs that are all zero.
    """
    _require_pictures(pictures, spec.vision.image_size)
    with _state(checkpoint, spec, pictures, work_folder) as state:
        work = _Stages(checkpoint, spec, pictures, state, on_progress)
        finished = _resumed(work) or work.from_stage(Finished())
    return VisionCalibration(finished.amax, len(pictures), sum(map(len, pictures)))


def _resumed(work: _Stages) -> Finished | None:
    """What a killed run's state leads to; None where there is none to be used."""
    finished = work.state.finished()
    if not finished.stages:
        return None
    try:
        return work.from_stage(finished)
    except DamagedStatesError as problem:
        log.warning("%s: calibrating from the first stage again", problem.message)
        return None


@contextmanager
def _state(
    checkpoint: Checkpoint, spec: ModelSpec, pictures: Sequence[Tiles], work_folder: Path | None
) -> Iterator[CalibrationState]:
    if work_folder is not None:
        yield CalibrationState(
            work_folder, calibration_digest(checkpoint, spec.vision, pictures, device=compute_device().type)
        )
        return
    with scratch_folder("calibration") as folder:
        yield CalibrationState(folder, digest="")


@dataclass(frozen=True)
class _Stages:
    """All pictures through all stages that FP8 is about, which are counted from 1."""

    checkpoint: Checkpoint
    spec: ModelSpec
    pictures: Sequence[Tiles]
    state: CalibrationState
    on_progress: Progress

    def from_stage(self, finished: Finished) -> Finished:
        """From the first one that is not finished to the last, each recorded when it is."""
        quantised_part = stages(self.spec.vision)[:-1]
        for stage in quantised_part[finished.stages :]:
            finished = self._through_one(_ObservedStage(stage, self.checkpoint, self.spec), finished)
            self.state.record(finished)
            log.info("calibrated vision stage %d of %d: %s", finished.stages, len(quantised_part), stage.name)
        return finished

    def _through_one(self, stage: _ObservedStage, before: Finished) -> Finished:
        """The hidden states are written for the next stage, which the last block has not."""
        vision, number, checksums = self.spec.vision, before.stages + 1, {}
        inputs = self.state.hidden_states(before) if before.stages else map(torch.tensor, self.pictures)
        outputs = self._reported(stage.outputs(inputs), stage.stage.name, number)
        if number <= vision.layers:
            shapes = [(len(picture), vision.positions, vision.hidden_size) for picture in self.pictures]
            checksums = self.state.write(number, shapes, outputs)
        else:
            deque(outputs, maxlen=0)  # they have to be finite all the same
        return Finished(number, {**before.amax, **stage.amax()}, checksums)

    def _reported(self, outputs: Iterable[torch.Tensor], name: str, number: int) -> Iterator[torch.Tensor]:
        """Progress in bytes of pixels, which pass once through every stage."""
        pixels = sum(picture.nbytes for picture in self.pictures)
        done, total = (number - 1) * pixels, (self.spec.vision.layers + 1) * pixels
        for picture, output in zip(self.pictures, outputs, strict=True):
            yield output
            done += picture.nbytes
            self.on_progress(f"calibrate vision: {name}", done, total)


class _ObservedStage:
    """One stage with its weights, which remembers the largest magnitudes that pass through it."""

    def __init__(self, stage: Stage, checkpoint: Checkpoint, spec: ModelSpec) -> None:
        self.stage, self.device = stage, compute_device()
        module = stage.from_checkpoint(checkpoint, spec)
        self.found = _weight_amax(stage, module)
        self.module = module.to(self.device)

    def outputs(self, pictures: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Of each picture's tiles, in runs that depend on nothing but their number."""
        for picture, tiles in enumerate(pictures):
            yield torch.cat([self._run(part, picture).cpu() for part in tiles.split(TILES_PER_RUN)])

    def amax(self) -> dict[str, float]:
        """All that was found. Raises NvlmError for an input that was zero in every picture."""
        for name, value in self.found.items():
            if value == 0:
                raise NvlmError(f"{name} was zero in all calibration pictures", hint="calibrate with real pictures")
        return {name: value.item() for name, value in self.found.items()}

    # cuDNN would convolve in TF32, three digits
    @torch.backends.cudnn.flags(enabled=False)
    @torch.inference_mode()
    def _run(self, tiles: torch.Tensor, picture: int) -> torch.Tensor:
        points = self.stage.observed(self.module, tiles.to(self.device))
        for name, value in points.items():
            if not torch.isfinite(magnitude(value)):
                raise NvlmError(f"{name} holds NaN or infinity in calibration picture {picture}")
        for name, value in self._quantised(points).items():
            self.found[name] = torch.maximum(self.found.get(name, value.new_zeros(())), magnitude(value))
        return points[self.stage.name]

    def _quantised(self, points: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self.stage.kind != "block":
            return {}
        named = {point.removeprefix(f"{self.stage.name}."): value for point, value in points.items()}
        named["v"] = named["qkv"].chunk(3, dim=-1)[2]
        return {f"{self.stage.name}.{name}": named[name] for name in (*LINEAR_INPUTS.values(), *ATTENTION_INPUTS)}


def _weight_amax(stage: Stage, module: nn.Module) -> dict[str, torch.Tensor]:
    """Of the linears that may be quantised. Raises NvlmError for any weight that cannot be right."""
    found = {}
    for name, weight in module.state_dict().items():
        chunks = SoundChunks(stage.prefix + name, iter((weight,)))
        deque(chunks, maxlen=0)
        if stage.kind == "block" and name.removesuffix(".weight") in LINEAR_INPUTS:
            found[chunks.name] = chunks.amax
    return found


def _require_pictures(pictures: Sequence[Tiles], size: int) -> None:
    if not len(pictures):
        raise NvlmError("no calibration pictures", hint="give at least one; a few hundred are usual")
    for number, picture in enumerate(pictures):
        if picture.dtype != np.uint8 or len(picture) == 0 or picture.shape[1:] != (size, size, 3):
            raise NvlmError(
                f"calibration picture {number} is {picture.dtype} {list(picture.shape)}, "
                f"expected uint8 {['1 or more', size, size, 3]}"
            )
