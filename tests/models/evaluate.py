"""Score the small model on scans it never saw, by greedy generation; exit 1 when a bar does not hold.

    python tests/models/evaluate.py [--checkpoint FOLDER] [--questions N] [--json]

BF16 weights computed in float32. Intervals are 95 % Wilson intervals; bars bind the point estimates.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from batches import with_tag_order
from digits import TASKS, Sample, samples
from nvlm_deploy.checkpoint.reader import Checkpoint
from nvlm_deploy.image_file.opening import open_image
from nvlm_deploy.model.decoder import decoder_from_checkpoint
from nvlm_deploy.model.prompt import PromptBuilder
from nvlm_deploy.model.spec import spec_from_checkpoint
from nvlm_deploy.model.tiling import tiles_from_image
from nvlm_deploy.model.vision import vision_tower_from_checkpoint

BARS = {"tile": 0.97, "read": 0.93, "count": 0.88, "largest": 0.96, "text": 0.99, "all": 0.95}
TAGS_FOLLOWED_BAR = 0.95
# Without tags a model that reads them can only pick some tile; more than this above chance, and it used the position.
ABOVE_CHANCE_BAR = 0.10
SEED = 2026
MAX_NEW_TOKENS = 14
BATCH = 64


@dataclass(frozen=True)
class Score:
    """Hits among n, with the interval and the bar that binds the share (`at_most` turns the bar around)."""

    what: str
    hits: int
    n: int
    bound: float
    at_most: bool = False
    note: str = ""

    @property
    def share(self) -> float:
        return self.hits / max(self.n, 1)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval."""
        z, n, p = 1.959964, max(self.n, 1), self.share
        centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))

    @property
    def holds(self) -> bool:
        return self.share <= self.bound if self.at_most else self.share >= self.bound


@dataclass(frozen=True)
class Prompt:
    """Ids with `<|vision_pad|>` at the visual positions, and the tiles that go there (None for text)."""

    ids: tuple[int, ...]
    tiles: torch.Tensor | None = None


class Model:
    """Greedy generation with the checkpoint's weights."""

    def __init__(self, folder: Path) -> None:
        checkpoint = Checkpoint.open(folder)
        self.spec = spec_from_checkpoint(checkpoint)
        self.builder = PromptBuilder(folder / "tokenizer.json", self.spec)
        self.tower = vision_tower_from_checkpoint(checkpoint, self.spec)
        self.decoder = decoder_from_checkpoint(checkpoint, self.spec)

    def prompt(self, sample: Sample) -> Prompt:
        if sample.image is None:
            return Prompt(tuple(self.builder.ids(sample.question)))
        tiles = torch.tensor(tiles_from_image(open_image(sample.image), self.spec.tiling))
        return Prompt(tuple(self.builder.ids(sample.question, [len(tiles)])), tiles)

    def answers(self, prompts: Sequence[Prompt]) -> list[str]:
        """One answer per prompt; prompts of equal length run together, so nothing is padded."""
        by_length: dict[int, list[int]] = {}
        for index, prompt in enumerate(prompts):
            by_length.setdefault(len(prompt.ids), []).append(index)
        answers = [""] * len(prompts)
        for indices in by_length.values():
            for start in range(0, len(indices), BATCH):
                group = indices[start : start + BATCH]
                for index, answer in zip(group, self._together([prompts[i] for i in group]), strict=True):
                    answers[index] = answer
        return answers

    @torch.no_grad()
    def _together(self, prompts: Sequence[Prompt]) -> list[str]:
        ids = torch.tensor([prompt.ids for prompt in prompts])
        embeddings = self.decoder.embed(ids)
        tiles = [prompt.tiles for prompt in prompts if prompt.tiles is not None]
        if tiles:
            embeddings[ids == self.builder.pad_token_id] = self.tower(torch.cat(tiles)).flatten(0, 1)
        end = self.spec.prompt.eos_token_id
        new: list[torch.Tensor] = []
        while len(new) < MAX_NEW_TOKENS and not (new and (torch.stack(new) == end).any(dim=0).all()):
            new.append(self.decoder(embeddings)[:, -1].argmax(-1))
            embeddings = torch.cat([embeddings, self.decoder.embed(new[-1])[:, None]], dim=1)
        return [self._text(row, end) for row in torch.stack(new, dim=1).tolist()]

    def _text(self, row: list[int], end: int) -> str:
        """The answer before `<|im_end|>`; one that never ends is marked, and so never right."""
        kept = row[: row.index(end)] if end in row else row
        text: str = self.builder.tokenizer.decode(kept, skip_special_tokens=False)
        return text if end in row else text + " ..."


def task_scores(model: Model, asked: Sequence[Sample]) -> list[Score]:
    """Exact answers per task and over all."""
    answers = model.answers([model.prompt(sample) for sample in asked])
    right = [answer == sample.answer for answer, sample in zip(answers, asked, strict=True)]
    found = []
    for task in TASKS:
        hits = [hit for hit, sample in zip(right, asked, strict=True) if sample.task == task]
        found.append(Score(task, sum(hits), len(hits), BARS[task]))
    return [*found, Score("all", sum(right), len(right), BARS["all"])]


def shuffled_tag_scores(model: Model, asked: Sequence[Sample], draw: random.Random) -> list[Score]:
    """Tags permuted among the tiles: whose digit is answered, the tag's or the position's? Only where they differ."""
    prompts, by_tag, by_position = [], [], []
    number_ids = [model.builder.tokenizer.token_to_id(str(number)) for number in range(10)]
    for sample in asked:
        order = draw.sample(range(1, len(sample.digits) + 1), len(sample.digits))
        wanted = str(sample.digits[order.index(_asked_tile(sample))])
        if wanted == sample.answer:
            continue
        prompt = model.prompt(sample)
        ids = with_tag_order(prompt.ids, order, model.builder.pad_token_id, number_ids)
        prompts.append(Prompt(tuple(ids), prompt.tiles))
        by_tag.append(wanted)
        by_position.append(sample.answer)
    answers = model.answers(prompts)
    return [
        Score("tags shuffled: tag followed", _hits(answers, by_tag), len(answers), TAGS_FOLLOWED_BAR),
        Score("tags shuffled: position followed", _hits(answers, by_position), len(answers), 0.05, at_most=True),
    ]


def removed_tag_score(model: Model, asked: Sequence[Sample]) -> Score:
    """Tags taken out of the prompt. Chance: the digit of a random tile of the picture."""
    prompts = []
    for sample in asked:
        prompt = model.prompt(sample)
        prompts.append(Prompt(tuple(without_tags(model.builder, prompt.ids)), prompt.tiles))
    chance = sum(s.digits.count(int(s.answer)) / len(s.digits) for s in asked) / max(len(asked), 1)
    hits = _hits(model.answers(prompts), [sample.answer for sample in asked])
    note = f"chance {100 * chance:.1f} %: a random tile of the picture"
    return Score("tags removed", hits, len(asked), chance + ABOVE_CHANCE_BAR, at_most=True, note=note)


def without_tags(builder: PromptBuilder, ids: Sequence[int]) -> list[int]:
    """`<Image>` pads `</Image>`: the ids between `<Image` and the last pad that are no pads become one `>`."""
    pads = [index for index, token in enumerate(ids) if token == builder.pad_token_id]
    first_tag = ids.index(builder.tokenizer.token_to_id("<Image")) + 1
    close = builder.tokenizer.token_to_id(">")
    return [*ids[:first_tag], close, *[builder.pad_token_id] * len(pads), *ids[pads[-1] + 1 :]]


def _asked_tile(sample: Sample) -> int:
    return int(sample.question.removesuffix("?").split()[-1])


def _hits(answers: Iterable[str], wanted: Iterable[str]) -> int:
    return sum(answer == right for answer, right in zip(answers, wanted, strict=True))


def evaluate(folder: Path, questions: int) -> list[Score]:
    """All scores of a checkpoint folder; the ablations ask for single tiles of pictures that have several."""
    model = Model(folder)
    scores = task_scores(model, samples(questions, seed=SEED))
    several = [s for s in samples(3 * questions, seed=SEED + 1) if s.task == "tile" and len(s.digits) > 1]
    return [*scores, *shuffled_tag_scores(model, several, random.Random(SEED)), removed_tag_score(model, several)]


def table(scores: Iterable[Score]) -> str:
    lines = [f"{'':34}{'right':>12}{'share':>9}   {'95 % interval':18}{'bar':>10}"]
    for score in scores:
        low, high = score.interval
        bar = f"{'<=' if score.at_most else '>='} {100 * score.bound:.1f}"
        lines.append(
            f"{score.what:34}{f'{score.hits}/{score.n}':>12}{100 * score.share:8.1f} %  "
            f"{f'{100 * low:.1f} .. {100 * high:.1f}':18}{bar:>10}  {'holds' if score.holds else 'FAILS'}  {score.note}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=Path(__file__).parent / "nvlm-d-tiny")
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    given = parser.parse_args()
    scores = evaluate(given.checkpoint, given.questions)
    if given.json:
        rows = [asdict(s) | {"share": s.share, "interval": s.interval, "holds": s.holds} for s in scores]
        print(json.dumps({"checkpoint": given.checkpoint.name, "scores": rows}, indent=2))
    else:
        print(table(scores))
    return 0 if all(score.holds for score in scores) else 1


if __name__ == "__main__":
    sys.exit(main())
