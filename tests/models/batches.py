"""Training batches in which all questions about an image share its prefix.

A row is the prompt up to the end of the image span, then one branch per question. A branch sees the prefix and itself
only, and its positions go on from the prefix, so that every branch is worth a sample of its own at a third of the price.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from digits import TILING, Picture, PictureMaker

from nvlm_deploy.model.prompt import PromptBuilder
from nvlm_deploy.model.tiling import tiles_from_image

NO_TARGET = -100
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
    """Rows of equal layout. tiles uint8 [rows * tiles, 56, 56, 3]; ids and targets [rows, length]; mask [length, length]."""

    tiles: torch.Tensor
    ids: torch.Tensor
    targets: torch.Tensor
    visual: torch.Tensor
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

    def __init__(self, builder: PromptBuilder, *, seed: int, held_out: bool, shuffle_tags: bool = True) -> None:
        self.builder = builder
        self.maker = PictureMaker(seed, held_out=held_out)
        self.shuffle_tags = shuffle_tags
        tokenizer = builder.tokenizer
        self.end = [tokenizer.token_to_id("<|im_end|>")]
        self.prompt_ids = lru_cache(maxsize=20_000)(lambda question, tiles: builder.ids(question, [tiles] if tiles else []))
        self.answer_ids = lru_cache(maxsize=20_000)(lambda answer: tokenizer.encode(answer).ids + self.end)
        self.number_ids = [tokenizer.token_to_id(str(number)) for number in range(10)]
        self.text_prefix = len(_common(builder.ids("Which"), builder.ids("How")))

    def batch(self, grids: Sequence[tuple[int, int]], tasks: Sequence[str] = TRAINING_TASKS) -> Batch:
        """One row per grid; all grids must have the same number of tiles."""
        pictures = [self.maker.picture(grid) for grid in grids]
        tiles = [tiles_from_image(picture.image, TILING) for picture in pictures]
        count = len(tiles[0])
        prefixes, rows = [], []
        for picture in pictures:
            order = self._tag_order(len(picture.digits))
            prefixes.append(self._prefix(count, order))
            rows.append(self._branches(picture, order, tasks, len(prefixes[-1])))
        return _packed(np.concatenate(tiles), prefixes, rows, self._visible(tasks, len(prefixes[0])), self.builder.pad_token_id)

    def _tag_order(self, tiles: int) -> list[int]:
        """Tag number of each tile. In order, a model reads by position and never looks at a tag (facts/small-model.md)."""
        order = list(range(1, tiles + 1))
        if self.shuffle_tags:
            self.maker.random.shuffle(order)
        return order

    def _prefix(self, tiles: int, order: Sequence[int]) -> list[int]:
        prefix = _common(self.prompt_ids("Which", tiles), self.prompt_ids("How", tiles))
        return with_tag_order(prefix, order, self.builder.pad_token_id, self.number_ids)

    def _branches(
        self, picture: Picture, order: Sequence[int], tasks: Sequence[str], image_prefix: int
    ) -> list[tuple[list[int], list[int]]]:
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


def _packed(
    tiles: np.ndarray,
    prefixes: list[list[int]],
    rows: list[list[tuple[list[int], list[int]]]],
    visible: list[tuple[str, int]],
    pad_token_id: int,
) -> Batch:
    widths = [max(len(prompt) + len(answer) for prompt, answer in column) for column in zip(*rows, strict=True)]
    prefix, length = len(prefixes[0]), len(prefixes[0]) + sum(widths)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    targets = torch.full_like(ids, NO_TARGET)
    positions = torch.arange(length)
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    mask[prefix:] = False
    ids[:, :prefix] = torch.tensor(prefixes)
    branches, start = [], prefix
    for column, (width, (task, seen)) in enumerate(zip(widths, visible, strict=True)):
        stop = start + width
        positions[start:stop] = torch.arange(seen, seen + width)
        mask[start:stop, :seen] = True
        mask[start:stop, start:stop] = torch.ones(width, width, dtype=torch.bool).tril()
        branches.append(Branch(task, start, stop, seen))
        for row, found in enumerate(rows):
            prompt, answer = found[column]
            middle, end = start + len(prompt), start + len(prompt) + len(answer)
            ids[row, start:end] = torch.tensor(prompt + answer)
            targets[row, middle:end] = torch.tensor(answer)
        start = stop
    visual = (ids[0] == pad_token_id).nonzero()[:, 0]
    return Batch(torch.from_numpy(tiles), ids, targets, visual, positions, mask, tuple(branches))
