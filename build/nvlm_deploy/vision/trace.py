"""One stage of the tower as an ONNX graph without weights, traced from torch on the `meta` device.

At full size the whole tower takes a minute to trace and one block a second, so blocks are traced once and copied
(vision/graph.py).
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nvlm_deploy.model.spec import ModelSpec
from nvlm_deploy.model.vision import Normalisation
from nvlm_deploy.tensors import TILES
from nvlm_deploy.vision.stages import Stage

if TYPE_CHECKING:
    import onnx_ir

# Gelu and FP8 Q/DQ are in it, TensorRT 10 and ONNX Runtime read it; 23 would bring the Attention op, which they do not
OPSET = 20


class _WithPoints(nn.Module):
    """A stage that gives all its points, so that the exporter keeps them as values."""

    def __init__(self, stage: Stage, module: nn.Module) -> None:
        super().__init__()
        self.stage = stage
        self.module = module

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.stage.observed(self.module, x).values())


def traced_stage(stage: Stage, spec: ModelSpec, dtype: torch.dtype) -> onnx_ir.Model:
    """The graph of one stage, opset 20; its values of `stage.points` have these names, its output is the last.

    Initialisers are named as the module's parameters and have no values, but for the normalisation's constants.
    """
    module = _WithPoints(stage, stage.without_weights(spec, dtype)).eval()
    with _without_exporter_noise():
        model = _exported(module, _example(stage, spec, dtype), stage)
        _optimise(model)
    _name_initialisers(model)
    _set_normalisation(model)
    del model.graph.outputs[:-1]
    require_borders(model, stage, spec)
    return model


def _example(stage: Stage, spec: ModelSpec, dtype: torch.dtype) -> torch.Tensor:
    """An input of two tiles; the first axis is free in the graph."""
    size, vision = spec.tiling.tile_size, spec.vision
    if stage.kind == "prologue":
        return torch.empty(2, size, size, 3, dtype=torch.uint8, device="meta")
    return torch.empty(2, vision.positions, vision.hidden_size, dtype=dtype, device="meta")


def _exported(module: nn.Module, example: torch.Tensor, stage: Stage) -> onnx_ir.Model:
    program = torch.onnx.export(
        module,
        (example,),
        dynamo=True,
        optimize=False,
        verbose=False,
        opset_version=OPSET,
        input_names=[TILES.name if stage.kind == "prologue" else "states"],
        output_names=stage.points,
        dynamic_shapes=({0: torch.export.Dim(str(TILES.axes[0]), min=1)},),
        custom_translation_table={torch.ops.aten.scaled_dot_product_attention.default: _plain_attention},
    )
    assert program is not None  # None is only for a call that writes the file itself
    return program.model


def _optimise(model: onnx_ir.Model) -> None:
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass
    from onnxscript.optimizer import optimize_ir

    for value in model.graph.initializers.values():
        value.const_value = None  # nothing of a meta tensor may be folded
    optimize_ir(model)
    ClearMetadataAndDocStringPass()(model)  # stack traces: they name the build machine's paths


def _plain_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
    """softmax(q k^T / sqrt(head_size)) v in the plain operators that TensorRT fuses into one kernel.

    TensorRT-RTX 1.7 fuses it only when the scores go through the base type between the first product and softmax
    (tests/vision/test_attention_fusion.py); the casts before the product are ModelOpt's (`insert_fp8_mha_casts`): they
    forbid accumulation in half precision. Unfused, the scores of a tile are 105 MB of float32 in memory.
    """
    import onnxscript

    op: Any = onnxscript.opset20
    float32, float16 = 1, 10
    base = query.dtype
    scale = op.CastLike(op.Constant(value_float=query.shape[-1] ** -0.5), query)
    # on q before the product, where TensorRT wants it
    query, key = op.Mul(query, scale), op.Transpose(key, perm=[0, 1, 3, 2])
    if base == float32:
        return op.MatMul(op.Softmax(op.MatMul(query, key), axis=-1), value)
    scores = op.Cast(op.MatMul(op.Cast(query, to=float32), op.Cast(key, to=float32)), to=base)
    weights = op.Cast(op.Softmax(op.Cast(scores, to=float32), axis=-1), to=base)
    if base != float16:
        return op.MatMul(weights, value)
    return op.Cast(op.MatMul(op.Cast(weights, to=float32), op.Cast(value, to=float32)), to=base)


def _name_initialisers(model: onnx_ir.Model) -> None:
    """`module.attn.qkv.weight` of the wrapper becomes `attn.qkv.weight`."""
    for value in list(model.graph.initializers.values()):
        assert value.name is not None
        value.name = value.name.removeprefix("module.")


def _set_normalisation(model: onnx_ir.Model) -> None:
    import onnx_ir

    for name, buffer in Normalisation().named_buffers():
        if f"normalisation.{name}" in model.graph.initializers:
            value = model.graph.initializers[f"normalisation.{name}"]
            value.const_value = onnx_ir.tensor(buffer, name=value.name)


def require_borders(model: onnx_ir.Model, stage: Stage, spec: ModelSpec) -> None:
    """The exporter silently freezes an axis when the network's Python looks at its length."""
    size, vision, tiles = spec.tiling.tile_size, spec.vision, str(TILES.axes[0])
    states: Sequence[int | str] = (tiles, vision.positions, vision.hidden_size)
    embeddings: Sequence[int | str] = (tiles, spec.tiling.tokens_per_tile, spec.decoder.hidden_size)
    expected_input = (tiles, size, size, 3) if stage.kind == "prologue" else states
    expected_output = embeddings if stage.kind == "epilogue" else states
    (source,), (result,) = model.graph.inputs, model.graph.outputs
    for value, expected in ((source, expected_input), (result, expected_output)):
        axes = tuple(axis if isinstance(axis, int) else str(axis) for axis in value.shape or ())
        if axes != tuple(expected):
            raise RuntimeError(f"{stage.name}: the exporter made {value.name} {list(axes)}, not {list(expected)}")


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
