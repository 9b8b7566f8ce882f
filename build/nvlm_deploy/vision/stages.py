"""The tower cut into stages, and the named points inside them: what is traced, calibrated and compared.

A stage is small enough to be in memory alone at full size. The tower's stages in order are `patch_embedding`,
`block.0` ... `block.N-1` and `embeddings`; each has the name of the value it gives. Inside a stage the points of
POINTS are values too: `pixels`, `block.17.q_norm`, `pixel_shuffle`. The ONNX graph carries the same names, so that the
same point can be looked at in torch and in an engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from nvlm_deploy.model.spec import ModelSpec, ProjectorSpec, VisionSpec
from nvlm_deploy.model.vision import (
    Normalisation,
    PatchEmbeddings,
    Projector,
    VisionBlock,
    pixel_shuffle,
    require_shapes,
)
from nvlm_deploy.tensors import EMBEDDINGS

if TYPE_CHECKING:
    from nvlm_deploy.checkpoint.reader import Checkpoint

Kind = Literal["prologue", "block", "epilogue"]
PATCH_EMBEDDING = "patch_embedding"

# point -> (submodule, whether the point is what goes into it or comes out of it), in the order of computation
POINTS: Mapping[Kind, Mapping[str, tuple[str, Literal["input", "output"]]]] = {
    "prologue": {"pixels": ("embeddings", "input")},
    "block": {
        "norm1": ("norm1", "output"),
        "qkv": ("attn.qkv", "output"),
        "q_norm": ("attn.q_norm", "output"),
        "k_norm": ("attn.k_norm", "output"),
        "attention": ("attn.proj", "input"),
        "proj": ("attn.proj", "output"),
        "attention_residual": ("norm2", "input"),
        "norm2": ("norm2", "output"),
        "fc1": ("mlp.fc1", "output"),
        "gelu": ("mlp.fc2", "input"),
        "fc2": ("mlp.fc2", "output"),
    },
    "epilogue": {
        "pixel_shuffle": ("mlp1.0", "input"),
        "projector_norm": ("mlp1.0", "output"),
        "projector_fc1": ("mlp1.1", "output"),
        "projector_gelu": ("mlp1.3", "input"),
    },
}


class Prologue(nn.Module):
    """uint8 tiles to the first block's input: normalised and cut into patches."""

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        self.normalisation = Normalisation()
        self.embeddings = PatchEmbeddings(spec)

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        """uint8 [tiles, H, W, 3] -> [tiles, positions, hidden]."""
        hidden: torch.Tensor = self.embeddings(self.normalisation(tiles))
        return hidden


class Epilogue(nn.Module):
    """The last block's output to prompt embeddings: class token dropped, pixel shuffle, projector."""

    def __init__(self, vision: VisionSpec, projector: ProjectorSpec) -> None:
        super().__init__()
        self.grid = vision.grid
        self.mlp1 = Projector(projector)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[tiles, positions, hidden] -> [tiles, tokens, decoder's hidden], in BF16 when computed in 16 bits.

        The decoder's prompt table is BF16 whatever the encoder's type.
        """
        embeddings: torch.Tensor = self.mlp1(pixel_shuffle(hidden[:, 1:], grid=self.grid))
        return embeddings.to(torch.bfloat16) if embeddings.dtype == torch.float16 else embeddings


@dataclass(frozen=True)
class Stage:
    """One stage of a tower: `name` is also that of its output, `prefix` of its weights in the checkpoint."""

    kind: Kind
    name: str
    prefix: str

    @property
    def points(self) -> list[str]:
        """Full names of its inner points in the order of computation, its output last."""
        inner = [f"{self.name}.{point}" if self.kind == "block" else point for point in POINTS[self.kind]]
        return [*inner, self.name]

    def without_weights(self, spec: ModelSpec, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The stage on `meta`: names, shapes and types only; the normalisation stays float32."""
        with torch.device("meta"):
            if self.kind == "block":
                return _frozen(VisionBlock(spec.vision).to(dtype))
            if self.kind == "epilogue":
                return _frozen(Epilogue(spec.vision, spec.projector).to(dtype))
            prologue = Prologue(spec.vision)
            prologue.embeddings.to(dtype)
            return _frozen(prologue)

    def from_checkpoint(self, checkpoint: Checkpoint, spec: ModelSpec, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The stage with its weights, dummy heads included, for inference.

        Raises NvlmError for missing or misshapen tensors.
        """
        module = self.without_weights(spec, dtype)
        require_shapes(module, checkpoint, prefix=self.prefix)
        weights = {name: checkpoint.tensor(self.prefix + name).to(dtype) for name in module.state_dict()}
        module.load_state_dict(weights, assign=True)
        if isinstance(module, Prologue):
            module.normalisation = Normalisation()
        return module

    def observed(self, module: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run the stage on [tiles, ...]; its points by full name, the output last."""
        found: dict[str, torch.Tensor] = {}
        names = dict(zip(POINTS[self.kind], self.points, strict=False))
        handles = [_observe(module, place, found, names[point]) for point, place in POINTS[self.kind].items()]
        try:
            output = module(x)
        finally:
            for handle in handles:
                handle.remove()
        return {**found, self.name: output}


def stages(vision: VisionSpec) -> list[Stage]:
    """The stages of a tower in order."""
    blocks = [Stage("block", f"block.{n}", f"vision_model.encoder.layers.{n}.") for n in range(vision.layers)]
    return [Stage("prologue", PATCH_EMBEDDING, "vision_model."), *blocks, Stage("epilogue", EMBEDDINGS.name, "")]


def states_by_stage(
    checkpoint: Checkpoint, spec: ModelSpec, tiles: torch.Tensor, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[Stage, nn.Module, torch.Tensor]]:
    """Each stage with its module and its input, one stage's weights in memory at a time.

    `tiles` uint8 [tiles, H, W, 3]; the next input is computed when the caller asks for it.
    """
    states = tiles
    for stage in stages(spec.vision):
        module = stage.from_checkpoint(checkpoint, spec, dtype)
        yield stage, module, states
        with torch.inference_mode():
            states = module(states)


def _frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False).eval()


def _observe(
    module: nn.Module, place: tuple[str, str], found: dict[str, torch.Tensor], name: str
) -> torch.utils.hooks.RemovableHandle:
    path, side = place
    submodule = module.get_submodule(path)

    def before(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        found[name] = inputs[0]

    def after(_: nn.Module, __: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        found[name] = output

    return submodule.register_forward_pre_hook(before) if side == "input" else submodule.register_forward_hook(after)
