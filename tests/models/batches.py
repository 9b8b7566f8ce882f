"""Training batches in which all questions about an image share its prefix.

A row is the prompt up to the end of the image span, then one branch per question. A branch sees the prefix and itself
only, and its positions go on from the prefix: every branch is worth a sample of its own at a third of the price.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from digits import TILING, Picture, PictureMaker
from nvlm_deploy.model.prompt import PromptBuilder
from nvlm_deploy.model.tiling import tiles_from_image

NO_TARGET = -100
Turn = tuple[list[int], list[int]]  # what is asked after the prefix, and the answer with its <|im_end|>
# Counting is learned last (a plateau near 55 %), so it is asked most.
TRAINING_TASKS = ("tile", "tile", "read", "count", "count", "count", "largest", "text", "text")


@dataclass(frozen=True)
class Branch:
    """Where one question of every row lies: columns [start, stop) and how much of the prefix it sees."""

    task: str
    start: int
    stop: int
    visible: int


@dataclass(frozen=True)
class Batch:
    """Rows of equal layout.

    tiles uint8 [rows * tiles, 56, 56, 3]; ids and targets [rows, length]; mask [length, length]; visual the columns of
    the visual tokens, and of each its tile's tag number and digit [rows, visual] (tag 0 and no digit: the thumbnail).
    """

    tiles: torch.Tensor
    ids: torch.Tensor
    targets: torch.Tensor
    visual: torch.Tensor
    tags: torch.Tensor
    digits: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    branches: tuple[Branch, ...]

    def exact(self, logits: torch.Tensor) -> dict[str, list[bool]]:
        """Per task: is the whole answer the likeliest, token by token? Equal to exact match under greedy generation."""
        right = (logits[:, :-1].argmax(-1) == self.targets[:, 1:]) | (self.targets[:, 1:] == NO_TARGET)
        found: dict[str, list[bool]] = {}
        for branch in self.branches:
            hits = right[:, branch.start - 1 : branch.stop - 1].all(dim=1)
            found.setdefault(branch.task, []).extend(hits.tolist())
        return found


class BatchMaker:
    """Makes batches for one side of the split."""

    def __init__(
        self,
        builder: PromptBuilder,
        *,
        seed: int,
        held_out: bool,
        shuffle_tags: bool = True,
    ) -> None:
        self.builder = builder
        self.maker = PictureMaker(seed, held_out=held_out)
        self.shuffle_tags = shuffle_tags
        tokenizer = builder.tokenizer
        self.end = [tokenizer.token_to_id("<|im_end|>")]
        # Questions and answers are few and come again: tokenising them anew was a third of a batch's cost.
        self.prompt_ids = cache(lambda question, tiles: builder.ids(question, [tiles] if tiles else []))
        self.answer_ids = cache(lambda answer: tokenizer.encode(answer).ids + self.end)
        self.number_ids = [tokenizer.token_to_id(str(number)) for number in range(10)]
        self.text_prefix = len(_common(builder.ids("Which"), builder.ids("How")))

    def batch(self, grids: Sequence[tuple[int, int]], tasks: Sequence[str] = TRAINING_TASKS) -> Batch:
        """One row per grid; all grids must have the same number of tiles."""
        pictures = [self.maker.picture(grid) for grid in grids]
        tiles = [tiles_from_image(picture.image, TILING) for picture in pictures]
        count = len(tiles[0])
        prefixes, rows, tags, digits = [], [], [], []
        for picture in pictures:
            order = self._tag_order(len(picture.digits))
            tags.append([*order, 0] if count > 1 else [0])
            digits.append([*picture.digits, NO_TARGET] if count > 1 else [*picture.digits])
            prefix = self._prefix(count, order)
            rows.append(self._branches(picture, order, tasks, len(prefix)))
            prefixes.append(prefix)
        columns = _columns(rows, self._visible(tasks, len(prefixes[0])), len(prefixes[0]))
        ids, targets = _filled(prefixes, rows, columns)
        each = self.builder.tokens_per_tile
        return Batch(
            tiles=torch.tensor(np.concatenate(tiles)),
            ids=ids,
            targets=targets,
            visual=(ids[0] == self.builder.pad_token_id).nonzero()[:, 0],
            tags=torch.tensor(tags).repeat_interleave(each, dim=1),
            digits=torch.tensor(digits).repeat_interleave(each, dim=1),
            positions=_positions(columns, len(prefixes[0])),
            mask=_mask(columns, len(prefixes[0])),
            branches=tuple(columns),
        )

    def _tag_order(self, tiles: int) -> list[int]:
        """Tag number of each tile. Were they always in order, the model would read by position and ignore the tags."""
        order = list(range(1, tiles + 1))
        if self.shuffle_tags:
            self.maker.random.shuffle(order)
        return order

    def _prefix(self, tiles: int, order: Sequence[int]) -> list[int]:
        prefix = _common(self.prompt_ids("Which", tiles), self.prompt_ids("How", tiles))
        return with_tag_order(prefix, order, self.builder.pad_token_id, self.number_ids)

    def _branches(self, picture: Picture, order: Sequence[int], tasks: Sequence[str], image_prefix: int) -> list[Turn]:
        by_tag = tuple(digit for _, digit in sorted(zip(order, picture.digits, strict=True)))
        tiles = len(picture.digits) + (len(picture.digits) > 1)
        found = []
        for task in tasks:
            question, answer = self.maker.question(task, by_tag)
            ids = self.prompt_ids(question, 0 if task == "text" else tiles)
            found.append((ids[self.text_prefix if task == "text" else image_prefix :], self.answer_ids(answer)))
        return found

    def _visible(self, tasks: Sequence[str], image_prefix: int) -> list[tuple[str, int]]:
        return [(task, self.text_prefix if task == "text" else image_prefix) for task in tasks]


def with_tag_order(ids: Sequence[int], order: Sequence[int], pad_token_id: int, number_ids: Sequence[int]) -> list[int]:
    """The prompt with `<tile_k>` of tile i renamed to `<tile_{order[i]}>`; only the number's own token changes."""
    changed = list(ids)
    starts = [i for i in range(1, len(ids)) if ids[i] == pad_token_id != ids[i - 1]]
    for start, tag in zip(starts[:-1], order, strict=False):
        changed[start - 2] = number_ids[tag]
    return changed


def _common(first: Sequence[int], second: Sequence[int]) -> list[int]:
    length = next(i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return list(first[:length])


def _columns(rows: Sequence[Sequence[Turn]], seen: Sequence[tuple[str, int]], prefix: int) -> list[Branch]:
    """The branches side by side after the prefix, each as wide as its longest row."""
    branches, start = [], prefix
    for turns, (task, visible) in zip(zip(*rows, strict=True), seen, strict=True):
        stop = start + max(len(prompt) + len(answer) for prompt, answer in turns)
        branches.append(Branch(task, start, stop, visible))
        start = stop
    return branches


def _filled(
    prefixes: Sequence[Sequence[int]], rows: Sequence[Sequence[Turn]], branches: Sequence[Branch]
) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.zeros(len(rows), branches[-1].stop, dtype=torch.long)
    targets = torch.full_like(ids, NO_TARGET)
    ids[:, : len(prefixes[0])] = torch.tensor(prefixes)
    for row, turns in enumerate(rows):
        for branch, (prompt, answer) in zip(branches, turns, strict=True):
            middle = branch.start + len(prompt)
            ids[row, branch.start : middle] = torch.tensor(prompt)
            ids[row, middle : middle + len(answer)] = torch.tensor(answer)
            targets[row, middle : middle + len(answer)] = torch.tensor(answer)
    return ids, targets


def _positions(branches: Sequence[Branch], prefix: int) -> torch.Tensor:
    parts = [torch.arange(branch.visible, branch.visible + branch.stop - branch.start) for branch in branches]
    return torch.cat([torch.arange(prefix), *parts])


def _mask(branches: Sequence[Branch], prefix: int) -> torch.Tensor:
    """True where a query may look: causal, and from a branch only into itself and what it sees of the prefix."""
    length = branches[-1].stop
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    for branch in branches:
        mask[branch.start : branch.stop, branch.visible : branch.start] = False
    return mask
