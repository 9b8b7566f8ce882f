"""Train the small NVLM-D from nothing on real handwritten digits, on two CPU cores.

    python tests/models/train.py --output tests/models/nvlm-d-tiny

First the encoder and projector learn to name each tile by the decoder's own digit embeddings; then the whole model
learns to answer, from two tiles up to six. Without the first stage nothing is learned in the same time. With
OMP_WAIT_POLICY=passive the two threads lose less when something else runs on the machine.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import nn
from torch.nn import functional

from batches import NO_TARGET, Batch, BatchMaker
from digits import GRIDS, TILING, PictureMaker
from folder import spec, without_dummy_heads, write_folder
from nvlm_deploy.checkpoint.reader import Checkpoint
from nvlm_deploy.model.decoder import Decoder
from nvlm_deploy.model.prompt import PromptBuilder
from nvlm_deploy.model.tiling import tiles_from_image
from nvlm_deploy.model.vision import VisionTower
from tokenizer import write_tokenizer

T = TypeVar("T")

# How often a batch has 1..6 tiles: more tiles are harder, and hold more questions worth asking.
TILE_COUNT_WEIGHTS = (1, 2, 3, 3, 3, 6)
# The visual tokens must know their tag before a question can look for it. Asked for nothing but answers, the model took
# ten minutes to find that out; a linear layer after this decoder layer, thrown away at the end, asks it directly.
BINDING_LAYER = 1
TAGS = 7


@dataclass(frozen=True)
class Plan:
    """What a run does; whichever of `steps` and `minutes` is spent first ends it."""

    steps: int = 2000
    minutes: float = 38.0
    naming_steps: int = 1000
    rows: int = 16
    first_tiles: int = 2
    learning_rate: float = 1.2e-3
    naming_rate: float = 2e-3
    hint_weight: float = 0.3
    warm_up: int = 100
    seed: int = 1
    save_every_s: float = 240.0


class PatchProduct(nn.Conv2d):
    """A convolution whose stride is its kernel, as the matrix product it is: several times faster backwards."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size = self.kernel_size[0]
        patches = functional.unfold(x, size, stride=size).transpose(1, 2)
        product = functional.linear(patches, self.weight.flatten(1), self.bias).transpose(1, 2)
        return product.reshape(len(x), -1, x.shape[2] // size, x.shape[3] // size)


class Outputs(NamedTuple):
    """logits [rows, length, vocabulary]; visual embeddings [rows, visual, hidden]; bound [rows, visual, tags + 10]."""

    logits: torch.Tensor
    visual: torch.Tensor
    bound: torch.Tensor


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

    def forward(self, batch: Batch) -> Outputs:
        rows = len(batch.ids)
        visual = self.tower(batch.tiles).unflatten(0, (rows, -1)).flatten(1, 2)
        embeddings = self.decoder.embed(batch.ids).clone()
        embeddings[:, batch.visual] = visual.to(embeddings.dtype)
        half_way: list[torch.Tensor] = []
        layer = self.decoder.model.layers[BINDING_LAYER]
        hook = layer.register_forward_hook(lambda _module, _inputs, hidden: half_way.append(hidden))
        logits = self.decoder(embeddings, positions=batch.positions[None], mask=batch.mask[None, None])
        hook.remove()
        return Outputs(logits, visual, self.bound(half_way[0][:, batch.visual]))


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
    # A visual token that reached the end of the residual stream unchanged should already spell its digit.
    model.decoder.lm_head.weight.data = 0.25 * model.decoder.model.embed_tokens.weight.data


def schedule(progress: float, step: int, warm_up: int) -> float:
    """Linear warm-up, then a cosine to a fiftieth."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return min(1.0, (step + 1) / warm_up) * (0.02 + 0.98 * cosine)


def optimizer(model: nn.Module, rate: float, vision_factor: float) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only; the encoder at its own rate."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        factor = vision_factor if "vision_model" in name else 1.0
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


def learn_to_name_tiles(model: TinyNvlm, builder: PromptBuilder, plan: Plan, started: float) -> None:
    """Stage one: every visual token of a tile points at the embedding of its digit."""
    maker = PictureMaker(plan.seed, held_out=False)
    adam = optimizer(model.tower, plan.naming_rate, 1.0)
    batches = made_ahead(lambda: named_tiles(maker, plan.rows))
    for step, (tiles, digits) in zip(range(plan.naming_steps), batches, strict=False):
        with autocast():
            visual = model.tower(tiles)
        loss = naming_loss(model, builder, visual, digits[:, None].expand(visual.shape[:2]))
        step_with(adam, model, loss, plan.naming_rate * schedule(step / plan.naming_steps, step, plan.warm_up))
        if step % 50 == 49:
            report(started, f"naming {step + 1}: {loss:.3f}  unseen scans {naming_accuracy(model, builder):.3f}")


def made_ahead(make: Callable[[], T]) -> Iterator[T]:
    """What `make` returns, again and again; the next is made in a thread while the last is used."""
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(make)
        while True:
            ready = waiting.result()
            waiting = pool.submit(make)
            yield ready


def report(started: float, text: str) -> None:
    print(f"{(time.monotonic() - started) / 60:5.1f} min  {text}", flush=True)


def named_tiles(maker: PictureMaker, pictures: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tiles [n, 56, 56, 3] and their digits [n], thumbnails left out."""
    tiles: list[torch.Tensor] = []
    digits: list[int] = []
    for _ in range(pictures):
        grid = maker.random.choice(GRIDS)
        picture = maker.picture(grid, tuple(maker.random.randrange(10) for _ in range(grid[0] * grid[1])))
        tiles.append(torch.tensor(tiles_from_image(picture.image, TILING)[: len(picture.digits)]))
        digits.extend(picture.digits)
    return torch.cat(tiles), torch.tensor(digits)


def naming_logits(model: TinyNvlm, builder: PromptBuilder, visual: torch.Tensor) -> torch.Tensor:
    """How near each visual token is to the embedding of each digit."""
    ids = torch.tensor([builder.tokenizer.token_to_id(str(number)) for number in range(10)])
    return visual.float() @ model.decoder.embed(ids).detach().float().T


def naming_loss(model: TinyNvlm, builder: PromptBuilder, visual: torch.Tensor, digits: torch.Tensor) -> torch.Tensor:
    return cross_entropy(naming_logits(model, builder, visual), digits)


def naming_accuracy(model: TinyNvlm, builder: PromptBuilder) -> float:
    tiles, digits = named_tiles(PictureMaker(7, held_out=True), 100)
    with torch.no_grad():
        logits = naming_logits(model, builder, model.tower(tiles)).mean(dim=1)
    return float((logits.argmax(-1) == digits).float().mean())


def learn_to_answer(model: TinyNvlm, builder: PromptBuilder, plan: Plan, output: Path, started: float) -> None:
    """Stage two: the whole model on questions; every few minutes the folder is written as it then is."""
    maker = BatchMaker(builder, seed=plan.seed + 1, held_out=False)
    adam = optimizer(model, plan.learning_rate, 0.5)
    begin = saved = time.monotonic()
    budget = plan.minutes * 60 - (begin - started)
    progress = 0.0
    batches = made_ahead(lambda: maker.batch(training_grids(maker.maker.random, progress, plan)))
    for step, batch in enumerate(batches):
        progress = max(step / plan.steps, (time.monotonic() - begin) / budget)
        if progress >= 1:
            break
        with autocast():
            found = model(batch)
        answering = cross_entropy(found.logits[:, :-1], batch.targets[:, 1:])
        binding = binding_loss(found.bound, batch)
        naming = naming_loss(model, builder, found.visual, batch.digits)
        loss = answering + plan.hint_weight * (1 - progress) * (binding + naming)
        step_with(adam, model, loss, plan.learning_rate * schedule(progress, step, plan.warm_up))
        if step % 50 == 49:
            losses = f"answering {answering:.3f} binding {binding:.3f} naming {naming:.3f}"
            report(started, f"step {step + 1}: {losses}  {scores(model, builder)}")
        if time.monotonic() - saved > plan.save_every_s:
            save(model, output)
            saved = time.monotonic()
    save(model, output)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean over the targets there are; logits [..., classes] in any type."""
    return functional.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), ignore_index=NO_TARGET)


def binding_loss(bound: torch.Tensor, batch: Batch) -> torch.Tensor:
    return cross_entropy(bound[..., :TAGS], batch.tags) + cross_entropy(bound[..., TAGS:], batch.digits)


def training_grids(draw: random.Random, progress: float, plan: Plan) -> list[tuple[int, int]]:
    """Grids of one batch, all of the same number of tiles: few in the beginning, up to six from a quarter on."""
    most = min(6, plan.first_tiles + int(progress * 16))
    count = draw.choices(range(1, most + 1), TILE_COUNT_WEIGHTS[:most])[0]
    same = [grid for grid in GRIDS if grid[0] * grid[1] == count]
    return [draw.choice(same) for _ in range(plan.rows)]


def scores(model: TinyNvlm, builder: PromptBuilder) -> str:
    """Exact answers per task on a few unseen scans, tags in order."""
    maker = BatchMaker(builder, seed=11, held_out=True, shuffle_tags=False)
    found: dict[str, list[bool]] = {}
    with torch.no_grad():
        for count in range(1, 7):
            same = [grid for grid in GRIDS if grid[0] * grid[1] == count]
            batch = maker.batch(same * (12 // len(same)))
            for task, hits in batch.exact(model(batch).logits).items():
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
    decoder = {n: checkpoint.tensor(f"language_model.{n}").float() for n in model.decoder.state_dict()}
    model.decoder.load_state_dict(decoder)


def main() -> None:
    defaults = Plan()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "nvlm-d-tiny")
    parser.add_argument("--minutes", type=float, default=defaults.minutes, help="time limit of both stages together")
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--naming-steps", type=int, default=defaults.naming_steps)
    parser.add_argument("--first-tiles", type=int, default=defaults.first_tiles, help="most tiles in the first batches")
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    parser.add_argument("--hint-weight", type=float, default=defaults.hint_weight, help="of the auxiliary losses")
    parser.add_argument("--naming-rate", type=float, default=defaults.naming_rate)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--start-from", type=Path, help="a folder written earlier: go on from it")
    given = parser.parse_args()
    plan = Plan(**{field.name: getattr(given, field.name) for field in fields(Plan) if hasattr(given, field.name)})
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
    learn_to_name_tiles(model, builder, plan, started)
    learn_to_answer(model, builder, plan, given.output, started)


if __name__ == "__main__":
    main()
