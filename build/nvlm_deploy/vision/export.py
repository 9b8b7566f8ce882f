"""Checkpoint -> vision ONNX: uint8 tiles in, prompt embeddings out, normalisation and projector inside the graph.

The graph is traced from the network on the `meta` device; the weights are streamed from the shards into the
external-data file. Memory does not grow with the model.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from nvlm_deploy.artifacts import resumable_folder
from nvlm_deploy.checkpoint.reader import Checkpoint
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.manifest import sha256_of_json
from nvlm_deploy.model.inventory import require_shape, vision_tensors
from nvlm_deploy.model.spec import ModelSpec, VisionSpec
from nvlm_deploy.progress import Progress, silent
from nvlm_deploy.vision.external_data import Slot, Weight, stream_weights
from nvlm_deploy.vision.graph_file import CALIBRATION_NAME, DATA_NAME, ONNX_NAME
from nvlm_deploy.vision.heads import nonzero_dummy_tensors, pruned, real_chunks
from nvlm_deploy.vision.qdq import Fp8Choice

if TYPE_CHECKING:
    import onnx_ir
    import torch

    from nvlm_deploy.vision.calibrate import VisionCalibration

log = logging.getLogger(__name__)

# precision -> torch's name of the type of what is not quantised
BASE_TYPES: Mapping[str, str] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "fp8": "bfloat16"}


@dataclass(frozen=True)
class Fp8Source:
    """What FP8 needs beyond the checkpoint: how to quantise, and the tiles, uint8 [n, S, S, 3], of real pictures."""

    choice: Fp8Choice
    pictures: Sequence[npt.NDArray[np.uint8]] = field(repr=False)


def onnx_from_checkpoint(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    output_folder: Path,
    *,
    precision: str = "bf16",
    fp8: Fp8Source | None = None,
    on_progress: Progress = silent,
) -> Path:
    """Write `vision.onnx` and its data file into `output_folder`; return the path of the graph.

    Input `tiles` uint8 [tiles, S, S, 3], output `embeddings` [tiles, tokens, hidden]: float32 for fp32, else bfloat16;
    the number of tiles is free. Dummy heads are left out when all of them are exactly zero. Raises NvlmError for
    missing, misshapen or non-finite tensors and values that the precision cannot hold. After a kill the same call goes
    on where it was.
    """
    export = vision_export(checkpoint, spec, precision=precision, fp8=fp8)
    with resumable_folder(output_folder, export.identity) as folder:
        export.write(folder, on_progress)
    return output_folder / ONNX_NAME


def vision_export(
    checkpoint: Checkpoint, spec: ModelSpec, *, precision: str, fp8: Fp8Source | None = None
) -> VisionExport:
    """What is to be written, after a look at every header and at the dummy heads. See `onnx_from_checkpoint`."""
    if precision not in BASE_TYPES:
        raise NvlmError(f"no vision precision {precision!r}; there is {', '.join(BASE_TYPES)}")
    if (precision == "fp8") != (fp8 is not None):
        raise NvlmError(f"precision {precision}: FP8 needs calibration pictures, the others take none")
    for name, shape in vision_tensors(spec).items():
        require_shape(checkpoint, name, shape)
    return VisionExport(checkpoint, spec, _without_zero_heads(checkpoint, spec), precision, fp8)


def _without_zero_heads(checkpoint: Checkpoint, spec: ModelSpec) -> VisionSpec:
    """The encoder to export: real heads only, unless a dummy head turns out to hold something."""
    dummies = spec.vision.padded_heads - spec.vision.heads
    nonzero = nonzero_dummy_tensors(checkpoint, spec.vision)
    if nonzero:
        log.warning("%d dummy heads kept: %s is not zero (%d such)", dummies, nonzero[0], len(nonzero))
        return spec.vision
    log.info("%d dummy heads are zero in every layer: left out", dummies)
    return pruned(spec.vision)


@dataclass(frozen=True)
class VisionExport:
    """One checkpoint's encoder and projector at one precision; `vision` has the heads that are exported."""

    checkpoint: Checkpoint
    spec: ModelSpec
    vision: VisionSpec
    precision: str
    fp8: Fp8Source | None = None

    @property
    def notes(self) -> dict[str, str]:
        """What the graph says of itself, in its metadata."""
        return {
            "nvlm.precision": self.precision,
            "nvlm.vision_heads": f"{self.vision.padded_heads} of {self.spec.vision.padded_heads}",
        }

    @cached_property
    def identity(self) -> str:
        """What an interrupted export may be resumed for: these shards, unchanged, and these choices."""
        pictures = [hashlib.sha256(tiles.data).hexdigest() for tiles in self.fp8.pictures] if self.fp8 else []
        return sha256_of_json([self.checkpoint.shard_states, repr(self), pictures])

    def write(self, folder: Path, on_progress: Progress) -> None:
        """Fill a folder, which may hold what a killed run of the same identity left."""
        import onnx
        import onnx_ir

        calibration = self._calibration(folder, on_progress) if self.fp8 else None
        model = self.graph()
        weights = self.weights(calibration)
        slots = stream_weights(folder / DATA_NAME, weights, identity=self.identity, on_progress=on_progress)
        _attach(model, slots, folder / DATA_NAME)
        onnx_ir.save(model, folder / ONNX_NAME)
        onnx.checker.check_model(str(folder / ONNX_NAME), full_check=True)

    def _calibration(self, folder: Path, on_progress: Progress) -> VisionCalibration:
        """Computed once: the file in the folder is the sign that a killed run had got so far."""
        from nvlm_deploy.vision.calibrate import VisionCalibration, calibrate_vision

        assert self.fp8 is not None  # the caller has looked
        path, state = folder / CALIBRATION_NAME, folder / "calibration-state"
        calibration = VisionCalibration.saved(path)
        if calibration is None:
            calibration = calibrate_vision(
                self.checkpoint, self.spec, self.fp8.pictures, work_folder=state, on_progress=on_progress
            )
            calibration.save(path)
        shutil.rmtree(state, ignore_errors=True)
        return calibration

    def graph(self) -> onnx_ir.Model:
        """The whole tower; its weights have names, shapes and types but no values yet."""
        import torch

        from nvlm_deploy.vision.graph import joined
        from nvlm_deploy.vision.qdq import quantise_block
        from nvlm_deploy.vision.stages import stages
        from nvlm_deploy.vision.trace import traced_stage

        exported = replace(self.spec, vision=self.vision)
        first, block, *_, last = stages(self.vision)
        dtype = getattr(torch, BASE_TYPES[self.precision])
        templates = {stage.kind: traced_stage(stage, exported, dtype) for stage in (first, block, last)}
        if self.fp8:
            quantise_block(templates["block"], self.fp8.choice)
        model = joined(self.vision, templates)
        model.metadata_props.update(self.notes)
        return model

    def weights(self, calibration: VisionCalibration | None = None) -> list[Weight]:
        """Where the values of the graph's weights come from; a calibration is what FP8 needs."""
        import torch

        dtype = getattr(torch, BASE_TYPES[self.precision])
        shapes = vision_tensors(replace(self.spec, vision=self.vision))
        weights = [Weight(name, dtype, shape, partial(self._chunks, name, dtype)) for name, shape in shapes.items()]
        if calibration is None or self.fp8 is None:
            return weights
        from nvlm_deploy.vision.quantize import quantised_weights

        return quantised_weights(weights, calibration, self.fp8.choice, head_size=self.vision.head_size)

    def _chunks(self, name: str, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        from nvlm_deploy.checkpoint.soundness import SoundChunks

        is_pruned = self.vision != self.spec.vision
        stored = real_chunks(self.checkpoint, name, self.spec.vision) if is_pruned else self.checkpoint.chunks(name)
        for chunk in SoundChunks(name, stored):
            cast = chunk.to(dtype)
            _require_fits(name, cast)
            yield cast


def _attach(model: onnx_ir.Model, slots: Mapping[str, Slot], data: Path) -> None:
    """Every weight of the graph gets its place in the data file; constants have their values."""
    import onnx_ir

    for value in model.graph.initializers.values():
        if value.const_value is None:
            assert value.name and value.dtype and isinstance(value.shape, onnx_ir.Shape)  # an initialiser has all three
            slot = slots[value.name]
            place = (data.name, slot.offset, slot.size_bytes)
            value.const_value = onnx_ir.ExternalTensor(
                *place, value.dtype, shape=value.shape, name=value.name, base_dir=data.parent
            )


def _require_fits(name: str, chunk: torch.Tensor) -> None:
    """Half precision ends at 65504; what is larger became infinite in the cast."""
    import torch

    if chunk.dtype == torch.float16 and chunk.numel() and not all(extreme.isfinite() for extreme in chunk.aminmax()):
        raise NvlmError(f"tensor {name} holds values that float16 cannot (above 65504)", hint="use precision bf16")
