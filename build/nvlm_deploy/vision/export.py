"""Checkpoint -> vision ONNX: uint8 tiles in, prompt embeddings out, normalisation and projector inside the graph.

The graph is exported from the network on the `meta` device, so that memory does not grow with the weights; these are
streamed from the shards into the external-data file (tried with 5.9 B parameters: facts running-on-a-cpu.md).
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvlm_deploy.artifacts import replace_folder
from nvlm_deploy.checkpoint.reader import Checkpoint
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.model.spec import ModelSpec
from nvlm_deploy.tensors import EMBEDDINGS, TILES
from nvlm_deploy.vision.external_data import ReadTensor, Slot, stream_tensors
from nvlm_deploy.vision.heads import nonzero_dummy_tensors, pruned, without_dummy_heads

if TYPE_CHECKING:
    import onnx_ir
    import torch

    from nvlm_deploy.model.vision import VisionTower

log = logging.getLogger(__name__)

ONNX_NAME = "vision.onnx"
DATA_NAME = "vision.onnx.data"

# Gelu and FP8 Q/DQ are in it, TensorRT 10 and ONNX Runtime read it; 23 would bring the Attention op, which they do not
OPSET = 20

PRECISIONS = ("fp32",)


def onnx_from_checkpoint(
    checkpoint: Checkpoint, spec: ModelSpec, output_folder: Path, *, precision: str = "fp32"
) -> Path:
    """Write `vision.onnx` and its data file into a fresh `output_folder`; return the path of the graph.

    Input `tiles` uint8 [tiles, S, S, 3], output `embeddings` [tiles, tokens, hidden]; the number of tiles is free.
    Dummy heads are left out when all of them are exactly zero. Raises NvlmError for missing, misshapen or non-finite
    tensors and for a graph that, read back, differs from torch; then nothing is written.
    """
    from nvlm_deploy.model.vision import require_shapes
    from nvlm_deploy.vision.compare import require_equal_to_torch

    if precision not in PRECISIONS:
        raise NvlmError(f"no vision precision {precision!r}; there is {', '.join(PRECISIONS)}")
    require_shapes(meta_tower(spec), checkpoint, prefix="")
    exported = _without_zero_heads(checkpoint, spec)
    with replace_folder(output_folder) as folder:
        _write_graph(folder, checkpoint, spec, exported)
        require_equal_to_torch(folder / ONNX_NAME, checkpoint, spec)
    return output_folder / ONNX_NAME


def meta_tower(spec: ModelSpec) -> VisionTower:
    """The network without weights: names, shapes and types only."""
    import torch

    from nvlm_deploy.model.vision import VisionTower

    with torch.device("meta"):
        return VisionTower(spec.vision, spec.projector).requires_grad_(False).eval()


def _without_zero_heads(checkpoint: Checkpoint, spec: ModelSpec) -> ModelSpec:
    """The spec to export: real heads only, unless a dummy head turns out to hold something."""
    dummies = spec.vision.padded_heads - spec.vision.heads
    nonzero = nonzero_dummy_tensors(checkpoint, spec.vision)
    if nonzero:
        log.warning("%d dummy heads kept: %s is not zero (%d such)", dummies, nonzero[0], len(nonzero))
        return spec
    log.info("%d dummy heads are zero in every layer: left out", dummies)
    return replace(spec, vision=pruned(spec.vision))


def _write_graph(folder: Path, checkpoint: Checkpoint, spec: ModelSpec, exported: ModelSpec) -> None:
    import onnx
    import onnx_ir

    tower = meta_tower(exported)
    model = onnx_model(tower, exported)
    read = _reader(checkpoint, spec, prune=exported.vision.padded_heads < spec.vision.padded_heads)
    slots = stream_tensors(folder / DATA_NAME, tower.state_dict(), read)
    _attach_weights(model, slots, folder / DATA_NAME)
    model.metadata_props["nvlm.vision_heads"] = f"{exported.vision.padded_heads} of {spec.vision.padded_heads}"
    onnx_ir.save(model, folder / ONNX_NAME)
    onnx.checker.check_model(str(folder / ONNX_NAME), full_check=True)


def _reader(checkpoint: Checkpoint, spec: ModelSpec, *, prune: bool) -> ReadTensor:
    import torch

    def read(name: str) -> torch.Tensor:
        tensor = checkpoint.tensor(name)
        return (without_dummy_heads(name, tensor, spec.vision) if prune else tensor).to(torch.float32)

    return read


def onnx_model(tower: VisionTower, spec: ModelSpec) -> onnx_ir.Model:
    """The graph of a tower on `meta`; its initialisers have names, shapes and types but no values yet."""
    import torch
    from onnxscript.optimizer import optimize_ir

    size = spec.tiling.tile_size
    tiles = torch.empty(2, size, size, 3, dtype=torch.uint8, device="meta")
    with _without_exporter_noise():
        program = torch.onnx.export(
            tower,
            (tiles,),
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=OPSET,
            input_names=[TILES.name],
            output_names=[EMBEDDINGS.name],
            dynamic_shapes=({0: torch.export.Dim(str(TILES.axes[0]), min=1)},),
            custom_translation_table={torch.ops.aten.scaled_dot_product_attention.default: _plain_attention},
        )
        assert program is not None  # None is only for a call that writes the file itself
        model = program.model
        for value in model.graph.initializers.values():
            value.const_value = None  # nothing of a meta tensor may be folded
        optimize_ir(model)
    require_borders(model, spec)
    return model


def _plain_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
    """softmax(q k^T / sqrt(head_size)) v in four operators, the pattern that TensorRT fuses.

    The exporter's own translation shuffles k through shapes that are computed at run time.
    """
    import onnxscript

    op: Any = onnxscript.opset20
    scores = op.MatMul(query, op.Transpose(key, perm=[0, 1, 3, 2]))
    scale = op.CastLike(op.Constant(value_float=query.shape[-1] ** -0.5), scores)
    return op.MatMul(op.Softmax(op.Mul(scores, scale), axis=-1), value)


def require_borders(model: onnx_ir.Model, spec: ModelSpec) -> None:
    """The exporter silently freezes an axis when the network's Python looks at its length."""
    size, tokens, hidden = spec.tiling.tile_size, spec.tiling.tokens_per_tile, spec.decoder.hidden_size
    borders = (
        (model.graph.inputs[0], TILES.with_axes(height=size, width=size)),
        (model.graph.outputs[0], EMBEDDINGS.with_axes(tokens=tokens, hidden=hidden)),
    )
    for value, tensor in borders:
        axes = tuple(axis if isinstance(axis, int) else str(axis) for axis in value.shape or ())
        if (value.name, axes) != (tensor.name, tensor.axes):
            raise RuntimeError(f"the exporter made {value.name} {list(axes)}, not {tensor.name} {list(tensor.axes)}")


def _attach_weights(model: onnx_ir.Model, slots: Mapping[str, Slot], data: Path) -> None:
    """Every initialiser gets its place in the data file, or its value when it is a constant of the normalisation."""
    import onnx_ir
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    from nvlm_deploy.model.vision import Normalisation

    constants = {f"normalisation.{name}": onnx_ir.tensor(buffer) for name, buffer in Normalisation().named_buffers()}
    for name, value in model.graph.initializers.items():
        if name in slots:
            value.const_value = _external_tensor(value, slots[name], data)
        elif value.const_value is None:
            value.const_value = constants[name]
            value.const_value.name = name
    ClearMetadataAndDocStringPass()(model)  # stack traces: they name the build machine's paths


def _external_tensor(value: onnx_ir.Value, slot: Slot, data: Path) -> onnx_ir.ExternalTensor:
    import onnx_ir

    assert value.name and value.dtype and isinstance(value.shape, onnx_ir.Shape)  # an initialiser has all three
    return onnx_ir.ExternalTensor(
        data.name, slot.offset, slot.size_bytes, value.dtype, shape=value.shape, name=value.name, base_dir=data.parent
    )


@contextlib.contextmanager
def _without_exporter_noise() -> Iterator[None]:
    """Silence what is no news: torchvision is not installed, and initialisers on `meta` have no values."""
    chatty = [
        logging.getLogger(name) for name in ("torch.onnx._internal.exporter._registration", "onnx_ir", "onnxscript")
    ]
    levels = [logger.level for logger in chatty]
    try:
        for logger in chatty:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for logger, level in zip(chatty, levels, strict=True):
            logger.setLevel(level)
