"""The decoder of a checkpoint, written as a TensorRT-LLM checkpoint: BF16 or FP8, for any split, from one calibration.

Weights are read, quantised and written a few MB at a time by a thread for each core; memory does not grow with the
model. After a kill the same call goes on with what was written.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from nvlm_deploy.artifacts import resumable_folder
from nvlm_deploy.checkpoint.reader import Checkpoint
from nvlm_deploy.checkpoint.resumable import in_threads
from nvlm_deploy.checkpoint.soundness import SoundChunks
from nvlm_deploy.checkpoint.trtllm import CheckpointWriter, TrtllmCheckpoint, checkpoint_writer, read_checkpoint
from nvlm_deploy.checkpoint.trtllm_layout import (
    ACTIVATION_SCALE,
    FP8,
    FP8_PER_CHANNEL,
    PER_CHANNEL_SCALE,
    SINGLE,
    WEIGHTS_SCALE,
    Layout,
    LayoutTensor,
    Parallelism,
)
from nvlm_deploy.llm.calibrate import CalibrationResult
from nvlm_deploy.llm.quantize import (
    codes_and_row_scales,
    given_up,
    kv_cache_scale,
    linear_chunks,
    linear_scales,
    require_calibrated,
)
from nvlm_deploy.llm.threads import one_torch_thread_each
from nvlm_deploy.manifest import sha256_of_json
from nvlm_deploy.model.decoder import PREFIX
from nvlm_deploy.model.fp8 import to_e4m3
from nvlm_deploy.model.inventory import require_shape
from nvlm_deploy.model.spec import ModelSpec
from nvlm_deploy.progress import Progress, silent

log = logging.getLogger(__name__)

# what `quant_algo` is when nobody says it
BY_CALIBRATION = "FP8 with a calibration, BF16 without"


def trtllm_checkpoint_from(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    output: Path,
    *,
    calibration: CalibrationResult | None,
    parallelism: Parallelism = SINGLE,
    quant_algo: str | None = BY_CALIBRATION,
    kv_cache_quant_algo: str | None = None,
    on_progress: Progress = silent,
) -> TrtllmCheckpoint:
    """Write the folder `output`, whole or not at all; return it read back. See `TrtllmExport`."""
    if quant_algo == BY_CALIBRATION:
        quant_algo = None if calibration is None else FP8
    layout = Layout(spec.decoder, quant_algo, parallelism, kv_cache_quant_algo)
    export = TrtllmExport(checkpoint, layout, calibration)
    export.require_sources()
    with resumable_folder(output, export.identity) as folder:
        export.write(folder, on_progress)
    return read_checkpoint(output)


@dataclass(frozen=True)
class TrtllmExport:
    """One checkpoint's decoder in one layout.

    Without a calibration ("data-free") there is BF16 and FP8_PER_CHANNEL_PER_TOKEN, which needs the weights only; what
    that gives up is in `notes` (contract A.9) and logged as a warning.
    """

    checkpoint: Checkpoint
    layout: Layout
    calibration: CalibrationResult | None = None

    @cached_property
    def identity(self) -> str:
        """What an interrupted export may be resumed for: these shards, unchanged, this layout, these scales."""
        amax = None if self.calibration is None else sorted(self.calibration.amax.items())
        source = [str(self.checkpoint.folder), self.checkpoint.shard_states]
        return sha256_of_json([*source, repr(self.layout), amax])

    @property
    def notes(self) -> dict[str, Any]:
        """For the manifest: where the scales come from, or what it costs that there is no calibration."""
        layout, calibration = self.layout, self.calibration
        if calibration is not None:
            counts = {"samples": calibration.samples, "tokens": calibration.tokens}
            return {"calibration": {**counts, "samples_digest": calibration.samples_digest}}
        losses = given_up(layout.quant_algo, layout.kv_cache_quant_algo)
        return {"data-free": losses} if losses else {}

    def require_sources(self) -> None:
        """Raises NvlmError for tensors that are missing or misshapen and for a calibration that lacks something."""
        for tensor in self.layout.tensors:
            for source, rows in zip(tensor.sources, tensor.source_rows(self.layout.spec), strict=False):
                require_shape(self.checkpoint, PREFIX + source, (rows, *tensor.shape[1:]))
        require_calibrated(self.layout, self.calibration)

    def write(self, folder: Path, on_progress: Progress = silent) -> None:
        """Fill a folder, which may hold what a killed run of the same identity left.

        Raises NvlmError for weights that are not finite, all zero or not those that were calibrated.
        """
        self.require_sources()
        for loss in self.notes.get("data-free", []):
            log.warning("data-free: %s", loss)
        with checkpoint_writer(folder, self.layout, identity=self.identity, on_progress=on_progress) as writer:
            jobs = [job for job in _jobs(self.layout) if not all(map(writer.is_finished, job.tensors))]
            with one_torch_thread_each():
                in_threads(lambda job: self._write(job, writer), jobs)

    def _write(self, job: _Job, writer: CheckpointWriter) -> None:
        if not job.weight.sources:
            layer = job.weight.name.replace("transformer.", "model.", 1).partition(".attention.")[0]
            writer.put(job.weight, kv_cache_scale(layer, self.calibration))
        elif not job.scales:
            with writer.rows(job.weight) as rows:
                for name in (PREFIX + source for source in job.weight.sources):
                    for chunk in SoundChunks(name, self.checkpoint.chunks(name)):
                        rows.append(chunk.to(torch.bfloat16))
        elif self.layout.quant_algo == FP8_PER_CHANNEL:
            self._write_per_channel(job, writer)
        else:
            self._write_per_tensor(job, writer)

    def _write_per_tensor(self, job: _Job, writer: CheckpointWriter) -> None:
        scales = linear_scales(job.weight.sources[0].removesuffix(".weight"), self.calibration)
        with writer.rows(job.weight) as rows:
            for chunk in self._linear(job):
                rows.append(to_e4m3(chunk, scales.weight))
        writer.put(job.scales[WEIGHTS_SCALE], scales.weight)
        writer.put(job.scales[ACTIVATION_SCALE], scales.activation)

    def _write_per_channel(self, job: _Job, writer: CheckpointWriter) -> None:
        row_scales = []
        with writer.rows(job.weight) as rows:
            for chunk in self._linear(job):
                codes, scales = codes_and_row_scales(chunk)
                rows.append(codes)
                row_scales.append(scales)
        writer.put(job.scales[PER_CHANNEL_SCALE], torch.cat(row_scales))

    def _linear(self, job: _Job) -> Iterator[torch.Tensor]:
        for source in job.weight.sources:
            yield from linear_chunks(self.checkpoint, source, self.calibration)


@dataclass(frozen=True)
class _Job:
    """A tensor with its scales, by the last part of their names: what one pass over the source gives."""

    weight: LayoutTensor
    scales: dict[str, LayoutTensor]

    @property
    def tensors(self) -> list[LayoutTensor]:
        return [self.weight, *self.scales.values()]


def _jobs(layout: Layout) -> Iterator[_Job]:
    """In the order of the computation, which is about that of the shards."""
    tensors = {tensor.name: tensor for tensor in layout.tensors}
    for tensor in layout.tensors:
        module, _, kind = tensor.name.rpartition(".")
        if tensor.dtype == "F8_E4M3":
            names = {scale: f"{module}.{scale}" for scale in (WEIGHTS_SCALE, ACTIVATION_SCALE, PER_CHANNEL_SCALE)}
            yield _Job(tensor, {scale: tensors[name] for scale, name in names.items() if name in tensors})
        elif kind not in (WEIGHTS_SCALE, ACTIVATION_SCALE, PER_CHANNEL_SCALE):
            yield _Job(tensor, {})
