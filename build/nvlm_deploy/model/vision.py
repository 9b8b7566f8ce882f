"""The vision half in torch: InternViT, pixel shuffle, projector. Parameter names are the checkpoint's own.

Reference mathematics (facts nvlm-d.md section 3), written once and used for training the small model, as the export's
source and as the oracle. Norms and softmax accumulate in float32 whatever the weights' type.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from nvlm_deploy.model.inventory import require_shape
from nvlm_deploy.model.spec import IMAGENET_MEAN, IMAGENET_STD, ModelSpec, ProjectorSpec, VisionSpec

if TYPE_CHECKING:
    from nvlm_deploy.checkpoint.reader import Checkpoint


class JointRmsNorm(nn.Module):
    """RMSNorm whose mean square runs over the first `real_width` channels only.

    For q and k of InternViT the norm is over all heads jointly, and dummy heads must not enter the divisor: it stays
    3200 although the tensor has 4096 channels (trap 2). For the block norms `real_width` is simply the width.
    """

    def __init__(self, width: int, epsilon: float, *, real_width: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon
        self.real_width = width if real_width is None else real_width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        mean_square = wide[..., : self.real_width].pow(2).mean(-1, keepdim=True)
        return (wide * torch.rsqrt(mean_square + self.epsilon)).to(x.dtype) * self.weight


class VisionAttention(nn.Module):
    """Full bidirectional attention with fused qkv (rows: all q, all k, all v) and joint QK-norm."""

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        width, real_width = spec.attention_width, spec.heads * spec.head_size
        self.heads, self.head_size = spec.padded_heads, spec.head_size
        self.qkv = nn.Linear(spec.hidden_size, 3 * width, bias=False)
        self.q_norm = JointRmsNorm(width, spec.norm_epsilon, real_width=real_width)
        self.k_norm = JointRmsNorm(width, spec.norm_epsilon, real_width=real_width)
        self.proj = nn.Linear(width, spec.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (self._by_head(part) for part in (self.q_norm(q), self.k_norm(k), v))
        attended = functional.scaled_dot_product_attention(q, k, v)
        projected: torch.Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return projected

    def _by_head(self, x: torch.Tensor) -> torch.Tensor:
        by_head: torch.Tensor = x.unflatten(-1, (self.heads, self.head_size)).transpose(1, 2)
        return by_head


class VisionMlp(nn.Module):
    """fc1, exact GELU, fc2."""

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        self.fc1 = nn.Linear(spec.hidden_size, spec.intermediate_size)
        self.fc2 = nn.Linear(spec.intermediate_size, spec.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.fc2(functional.gelu(self.fc1(x)))
        return hidden


class VisionBlock(nn.Module):
    """Pre-norm attention and MLP, each scaled by a learned vector before its residual addition."""

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        self.norm1 = JointRmsNorm(spec.hidden_size, spec.norm_epsilon)
        self.norm2 = JointRmsNorm(spec.hidden_size, spec.norm_epsilon)
        self.attn = VisionAttention(spec)
        self.mlp = VisionMlp(spec)
        self.ls1 = nn.Parameter(torch.ones(spec.hidden_size))
        self.ls2 = nn.Parameter(torch.ones(spec.hidden_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.ls1 * self.attn(self.norm1(x))
        hidden: torch.Tensor = x + self.ls2 * self.mlp(self.norm2(x))
        return hidden


class PatchEmbeddings(nn.Module):
    """Patches by a strided convolution, the class token in front, learned positions added.

    In float32, rounded once at the end: pixels keep their 8 bits, and it is a thousandth of a block's work.
    """

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, spec.hidden_size))
        self.patch_embedding = nn.Conv2d(3, spec.hidden_size, spec.patch_size, stride=spec.patch_size)
        self.position_embedding = nn.Parameter(torch.zeros(1, spec.positions, spec.hidden_size))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """float32 [tiles, 3, size, size] -> [tiles, positions, hidden] in the weights' type."""
        weight, bias = (parameter.float() for parameter in self.patch_embedding.parameters())
        patches = functional.conv2d(pixels, weight, bias, stride=self.patch_embedding.stride)
        class_token = self.class_embedding.float().expand(pixels.shape[0], -1, -1)
        embedded = torch.cat([class_token, patches.flatten(2).transpose(1, 2)], dim=1)
        return (embedded + self.position_embedding.float()).to(self.class_embedding.dtype)


class VisionEncoder(nn.Module):
    """InternViT; its last block's output is used as it is, without a final norm."""

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        self.embeddings = PatchEmbeddings(spec)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(VisionBlock(spec) for _ in range(spec.layers))})

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised float32 pixels [tiles, 3, size, size] -> [tiles, positions, hidden], class token first."""
        hidden: torch.Tensor = self.embeddings(pixels)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden

    @property
    def blocks(self) -> nn.ModuleList:
        layers = self.encoder["layers"]
        assert isinstance(layers, nn.ModuleList)  # for the type checker; set in __init__
        return layers


class Normalisation(nn.Module):
    """uint8 [tiles, H, W, 3] -> float [tiles, 3, H, W]: ImageNet mean and standard deviation of values in 0..1."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        # the cast comes first: TensorRT takes uint8 into a cast and nowhere else
        return (tiles.float().permute(0, 3, 1, 2) / 255 - self.mean) / self.std


class ProjectorNorm(nn.LayerNorm):
    """LayerNorm in float32 whatever the weights' type, as the encoder's norms."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return functional.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class Projector(nn.Sequential):
    """LayerNorm, Linear, exact GELU, Linear; no biases on the linears."""

    def __init__(self, spec: ProjectorSpec) -> None:
        super().__init__(
            ProjectorNorm(spec.input_size, eps=spec.norm_epsilon),
            nn.Linear(spec.input_size, spec.hidden_size, bias=False),
            nn.GELU(),
            nn.Linear(spec.hidden_size, spec.output_size, bias=False),
        )


class VisionTower(nn.Module):
    """uint8 tiles to prompt embeddings: normalisation, encoder, pixel shuffle, projector."""

    def __init__(self, vision: VisionSpec, projector: ProjectorSpec) -> None:
        super().__init__()
        self.vision = vision
        self.normalisation = Normalisation()
        self.vision_model = VisionEncoder(vision)
        self.mlp1 = Projector(projector)

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        """uint8 [tiles, H, W, 3] -> [tiles, tokens, hidden] in the weights' type."""
        hidden = self.vision_model(self.normalisation(tiles))
        embeddings: torch.Tensor = self.mlp1(pixel_shuffle(hidden[:, 1:], grid=self.vision.grid))
        return embeddings


def pixel_shuffle(patches: torch.Tensor, *, grid: int) -> torch.Tensor:
    """Version 2: [tiles, grid*grid, c] -> [tiles, (grid/2)**2, 4c]; row-major in and out.

    Channels of a token: its top-left, top-right, bottom-left, bottom-right patch. Version 1 would transpose the grid.
    """
    half, channels = grid // 2, patches.shape[-1]
    blocks = patches.reshape(-1, half, 2, half, 2, channels).permute(0, 1, 3, 2, 4, 5)
    return blocks.reshape(-1, half * half, 4 * channels)


def vision_tower_from_checkpoint(
    checkpoint: Checkpoint, spec: ModelSpec, dtype: torch.dtype = torch.float32
) -> VisionTower:
    """The tower with the checkpoint's weights, for inference. Raises NvlmError for missing or misshapen tensors."""
    with torch.device("meta"):
        tower = VisionTower(spec.vision, spec.projector)
    require_shapes(tower, checkpoint, prefix="")
    weights = {name: checkpoint.tensor(name).to(dtype) for name in tower.state_dict()}
    tower.load_state_dict(weights, assign=True)
    tower.normalisation = Normalisation()
    return tower.requires_grad_(False).eval()


def require_shapes(module: nn.Module, checkpoint: Checkpoint, *, prefix: str) -> None:
    """Every parameter of `module` is in the checkpoint with its shape, before a byte is read."""
    for name, parameter in module.state_dict().items():
        require_shape(checkpoint, prefix + name, tuple(parameter.shape))
