"""The decoder of a checkpoint, written as a TensorRT-LLM checkpoint: FP8 with a calibration, BF16 without one."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

import torch

from nvlm_deploy.artifacts import replace_folder
from nvlm_deploy.checkpoint.reader import Checkpoint
from nvlm_deploy.checkpoint.trtllm import TrtllmCheckpoint, checkpoint_writer, read_checkpoint
from nvlm_deploy.checkpoint.trtllm_layout import FP8, SINGLE, Layout, LayoutTensor, Parallelism
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.llm.calibrate import CalibrationResult, magnitude
from nvlm_deploy.llm.quantize import quantised_layer
from nvlm_deploy.model.decoder import PREFIX
from nvlm_deploy.model.spec import ModelSpec

log = logging.getLogger(__name__)


def trtllm_checkpoint_from(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    output: Path,
    *,
    calibration: CalibrationResult | None,
    parallelism: Parallelism = SINGLE,
) -> TrtllmCheckpoint:
    """Write the folder `output`, whole or not at all, with one layer in memory at a time; return it read back.

    FP8 with a calibration, BF16 (quant_algo null) without. Raises NvlmError before anything is written for a split that
    the decoder does not allow (naming the legal ones) and for tensors that are missing or misshapen; while writing, for
    weights that are not finite.
    """
    layout = Layout(spec.decoder, None if calibration is None else FP8, parallelism)
    _require_sources(checkpoint, layout)
    with replace_folder(output) as temporary, checkpoint_writer(temporary, layout) as writer:
        for tensor in layout.before_layers + layout.after_layers:
            writer.put(tensor, _from_sources(tensor, _sources(checkpoint, [tensor])))
        for index in range(spec.decoder.layers):
            tensors = layout.layer(index)
            weights = _sources(checkpoint, tensors)
            quantised = {} if calibration is None else quantised_layer(tensors, weights, calibration)
            for tensor in tensors:
                value = quantised.get(tensor.name)
                writer.put(tensor, _from_sources(tensor, weights) if value is None else value)
            log.info("wrote layer %d of %d", index + 1, spec.decoder.layers)
    return read_checkpoint(output)


def _from_sources(tensor: LayoutTensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([weights[source] for source in tensor.sources]).to(torch.bfloat16)


def _sources(checkpoint: Checkpoint, tensors: Iterable[LayoutTensor]) -> dict[str, torch.Tensor]:
    """Hugging Face's tensors behind these; NvlmError naming one that is not finite."""
    weights = {source: checkpoint.tensor(PREFIX + source) for tensor in tensors for source in tensor.sources}
    for name, weight in weights.items():
        if not torch.isfinite(magnitude(weight)):
            raise NvlmError(f"tensor {PREFIX}{name} holds NaN or infinity", hint="fetch its shard again")
    return weights


def _require_sources(checkpoint: Checkpoint, layout: Layout) -> None:
    """Every tensor is there with its shape, by the headers: nothing is written for a checkpoint that cannot be."""
    for tensor in layout.tensors:
        for source, rows in zip(tensor.sources, tensor.source_rows(layout.spec), strict=False):
            found, expected = checkpoint.shape(PREFIX + source), (rows, *tensor.shape[1:])
            if found != expected:
                raise NvlmError(
                    f"tensor {PREFIX}{source} has shape {list(found)}, expected {list(expected)} by config.json",
                    hint=f"`nvlm inspect {checkpoint.folder}` compares config.json with the shards",
                )
