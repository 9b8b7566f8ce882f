"""Train the small NVLM-D from nothing on real handwritten digits, on two CPU cores.

    python tests/models/train.py --output tests/models/nvlm-d-tiny

First the encoder and projector learn to name each tile by the decoder's own digit embeddings; then the whole model learns
to answer. Without the first stage nothing is learned in the same time (facts/small-model.md).
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from batches import NO_TARGET, Batch, BatchMaker
from digits import GRIDS, TILING, PictureMaker
from folder import spec, without_dummy_heads, write_folder
from tokenizer import write_tokenizer
from torch import nn
from torch.nn import functional

from nvlm_deploy.checkpoint.reader import Checkpoint
from nvlm_deploy.model.decoder import Decoder
from nvlm_deploy.model.prompt import PromptBuilder
from nvlm_deploy.model.tiling import tiles_from_image
from nvlm_deploy.model.vision import VisionTower

# How often a batch has 1..6 tiles: more tiles are harder, and hold more questions worth asking.
TILE_COUNT_WEIGHTS = (1, 2, 3, 3, 3, 6)
# The visual tokens must know their tag before a question can look for it. Asked for nothing but answers, the model took
# ten minutes to find that out; a linear layer after this decoder layer, thrown away at the end, asks it directly.
BINDING_LAYER = 1
TAGS = 7


@dataclass(frozen=True)
class Plan:
    """What a run does; whichever of `steps` and `minutes` is spent first ends it."""

    steps: int = 4500
    minutes: float = 36.0
    naming_steps: int = 700
    rows: int = 16
    learning_rate: float = 1.2e-3
    naming_rate: float = 2e-3
    binding_weight: float = 0.3
    warm_up: int = 100
    seed: int = 1
    save_every_s: float = 240.0


class PatchProduct(nn.Conv2d):
    """A convolution whose stride is its kernel, as the matrix product it is: its backward pass is several times faster."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size = self.kernel_size[0]
        patches = functional.unfold(x, size, stride=size).transpose(1, 2)
        product = functional.linear(patches, self.weight.flatten(1), self.bias).transpose(1, 2)
        return product.unflatten(2, (x.shape[2] // size, x.shape[3] // size))


class TinyNvlm(nn.Module):
    """Encoder, projector and decoder as one module, on real heads only."""

    def __init__(self) -> None:
        super().__init__()
        shapes = spec(padded_heads=spec().vision.heads)
        self.tower = VisionTower(shapes.vision, shapes.projector)
        self.tower.vision_model.embeddings.patch_embedding = PatchProduct(
            3, shapes.vision.hidden_size, shapes.vision.patch_size, stride=shapes.vision.patch_size
        )
        self.decoder = Decoder(shapes.decoder)
        self.bound = nn.Linear(shapes.decoder.hidden_size, TAGS + 10)

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [rows, length, vocabulary], and of the visual tokens half-way up [rows, visual, tags + digits]."""
        rows = len(batch.ids)
        visual = self.tower(batch.tiles)
        embeddings = self.decoder.embed(batch.ids).clone()
        embeddings[:, batch.visual] = visual.reshape(rows, -1, visual.shape[-1]).to(embeddings.dtype)
        half_way: list[torch.Tensor] = []
        hook = self.decoder.model.layers[BINDING_LAYER].register_forward_hook(lambda _, __, hidden: half_way.append(hidden))
        logits = self.decoder(embeddings, positions=batch.positions[None], mask=batch.mask[None, None])
        hook.remove()
        return logits, self.bound(half_way[0][:, batch.visual])


def initialise(model: TinyNvlm) -> None:
    """Weights by fan-in; embeddings at the scale of the projector's first outputs; layer scales and norms at one."""
    depth = len(model.decoder.model.layers)
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and not name.endswith(("embed_tokens.weight", "_embedding")):
            nn.init.normal_(parameter, std=0.6 * parameter[0].numel() ** -0.5)
        elif parameter.ndim >= 2:
            nn.init.normal_(parameter, std=0.2)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.ones_(parameter)
        if name.endswith(("o_proj.weight", "down_proj.weight", "attn.proj.weight", "fc2.weight")):
            parameter.data /= math.sqrt(2 * depth)


def schedule(progress: float, step: int, warm_up: int) -> float:
    """Linear warm-up, then a cosine to a fiftieth."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return min(1.0, (step + 1) / warm_up) * (0.02 + 0.98 * cosine)


def optimizer(model: TinyNvlm, rate: float, vision_factor: float) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only; the encoder at its own rate."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        factor = vision_factor if name.startswith("tower.vision_model") else 1.0
        groups.setdefault((factor, 0.05 if parameter.ndim == 2 else 0.0), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": found, "factor": f, "weight_decay": decay} for (f, decay), found in groups.items()],
        lr=rate,
        betas=(0.9, 0.95),
        foreach=True,
    )


def step_with(optimizer: torch.optim.Optimizer, model: nn.Module, loss: torch.Tensor, rate: float) -> None:
    """One update at `rate`, gradients clipped to norm 1."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]
    optimizer.step()


def learn_to_name_tiles(model: TinyNvlm, builder: PromptBuilder, plan: Plan) -> None:
    """Stage one: every visual token of a tile points at the embedding of its digit."""
    number_ids = torch.tensor([builder.tokenizer.token_to_id(str(number)) for number in range(10)])
    maker = PictureMaker(plan.seed, held_out=False)
    adam = optimizer(model, plan.naming_rate, 1.0)
    for step in range(plan.naming_steps):
        tiles, digits = named_tiles(maker, 16)
        with autocast():
            visual = model.tower(tiles)
            logits = visual.float() @ model.decoder.embed(number_ids).float().T
        loss = cross_entropy(logits, digits.repeat_interleave(logits.shape[1]))
        step_with(adam, model, loss, plan.naming_rate * schedule(step / plan.naming_steps, step, plan.warm_up))
        if step % 50 == 49:
            print(f"naming {step + 1}: loss {loss.item():.3f}, held-out {naming_accuracy(model, number_ids):.3f}", flush=True)
    with torch.no_grad():
        model.decoder.lm_head.weight[number_ids] = model.decoder.embed(number_ids)


def named_tiles(maker: PictureMaker, pictures: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tiles [n, 56, 56, 3] and their digits [n], thumbnails left out."""
    tiles, digits = [], []
    for _ in range(pictures):
        grid = maker.random.choice(GRIDS)
        picture = maker.picture(grid, tuple(maker.random.randrange(10) for _ in range(grid[0] * grid[1])))
        tiles.append(torch.tensor(tiles_from_image(picture.image, TILING)[: len(picture.digits)]))
        digits.extend(picture.digits)
    return torch.cat(tiles), torch.tensor(digits)


def naming_accuracy(model: TinyNvlm, number_ids: torch.Tensor) -> float:
    tiles, digits = named_tiles(PictureMaker(7, held_out=True), 100)
    with torch.no_grad():
        logits = model.tower(tiles).mean(dim=1) @ model.decoder.embed(number_ids).T
    return float((logits.argmax(-1) == digits).float().mean())


def learn_to_answer(model: TinyNvlm, builder: PromptBuilder, plan: Plan, output: Path, started: float) -> None:
    """Stage two: the whole model on questions; every few minutes the folder is written as it then is."""
    maker = BatchMaker(builder, seed=plan.seed + 1, held_out=False, split_seam_share=0.2)
    adam = optimizer(model, plan.learning_rate, 0.3)
    begin = saved = time.monotonic()
    budget = plan.minutes * 60 - (begin - started)
    for step in itertools.count():
        progress = max(step / plan.steps, (time.monotonic() - begin) / budget)
        if progress >= 1:
            break
        batch = maker.batch(training_grids(maker.maker.random, progress, plan.rows))
        with autocast():
            logits, bound = model(batch)
        binding = binding_loss(bound, batch)
        answering = cross_entropy(logits[:, :-1], batch.targets[:, 1:])
        loss = answering + plan.binding_weight * (1 - progress) * binding
        step_with(adam, model, loss, plan.learning_rate * schedule(progress, step, plan.warm_up))
        if step % 50 == 49:
            minutes = (time.monotonic() - started) / 60
            print(f"{minutes:5.1f} min, step {step + 1}: answering {answering.item():.3f} binding {binding.item():.3f}  {scores(model, builder)}", flush=True)
        if time.monotonic() - saved > plan.save_every_s:
            save(model, output)
            saved = time.monotonic()
    save(model, output)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean over the targets there are; logits [..., classes] in any type."""
    return functional.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), ignore_index=NO_TARGET)


def binding_loss(bound: torch.Tensor, batch: Batch) -> torch.Tensor:
    return cross_entropy(bound[..., :TAGS], batch.tags) + cross_entropy(bound[..., TAGS:], batch.digits)


def training_grids(draw: random.Random, progress: float, rows: int) -> list[tuple[int, int]]:
    """Grids of one batch, all of the same number of tiles: two at the most in the beginning, six from a quarter on."""
    most = min(6, 2 + int(progress * 16))
    count = draw.choices(range(1, most + 1), TILE_COUNT_WEIGHTS[:most])[0]
    same = [grid for grid in GRIDS if grid[0] * grid[1] == count]
    return [draw.choice(same) for _ in range(rows)]


def scores(model: TinyNvlm, builder: PromptBuilder) -> str:
    """Exact answers per task on a few unseen scans, tags in order."""
    maker = BatchMaker(builder, seed=11, held_out=True, shuffle_tags=False)
    found: dict[str, list[bool]] = {}
    with torch.no_grad():
        for count in range(1, 7):
            same = [grid for grid in GRIDS if grid[0] * grid[1] == count]
            batch = maker.batch(same * (12 // len(same)))
            for task, hits in batch.exact(model(batch)[0]).items():
                found.setdefault(task, []).extend(hits)
    return "  ".join(f"{task} {100 * sum(hits) / len(hits):.0f}" for task, hits in found.items())


def autocast() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def save(model: TinyNvlm, output: Path) -> None:
    write_folder(output, model.tower.state_dict(), model.decoder.state_dict())


def load(model: TinyNvlm, folder: Path) -> None:
    """The weights of a folder that `save` wrote, without the dummy heads."""
    checkpoint = Checkpoint.open(folder)
    real = without_dummy_heads
    model.tower.load_state_dict({n: real(n, checkpoint.tensor(n).float()) for n in model.tower.state_dict()})
    model.decoder.load_state_dict({n: checkpoint.tensor(f"language_model.{n}").float() for n in model.decoder.state_dict()})


def main() -> None:
    defaults = Plan()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "nvlm-d-tiny")
    parser.add_argument("--minutes", type=float, default=defaults.minutes, help="time limit of both stages together")
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--naming-steps", type=int, default=defaults.naming_steps)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--start-from", type=Path, help="a folder written earlier: go on from it, without the first stage")
    given = parser.parse_args()
    plan = Plan(steps=given.steps, minutes=given.minutes, naming_steps=given.naming_steps, seed=given.seed)
    started = time.monotonic()
    torch.manual_seed(plan.seed)
    given.output.mkdir(parents=True, exist_ok=True)
    write_tokenizer(given.output / "tokenizer.json")
    builder = PromptBuilder(given.output / "tokenizer.json", spec())
    model = TinyNvlm()
    initialise(model)
    if given.start_from:
        load(model, given.start_from)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on real heads", flush=True)
    if not given.start_from:
        learn_to_name_tiles(model, builder, plan)
    learn_to_answer(model, builder, plan, given.output, started)


if __name__ == "__main__":
    main()
