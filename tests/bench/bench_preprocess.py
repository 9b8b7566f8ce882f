"""Images to tiles: the server's way beside the reference steps, and beside its floor of one decode and two resizes.

    python tests/bench/bench_preprocess.py

The reference decodes, resizes, crops and makes normalised floats on the host; ours stops at uint8, as the engine
normalises. Its floats are made in numpy (`reference`), and, for comparison without a bar, by torch's operators in the
order of the model card's torchvision transform (`card`). Prints a table and, as its last line, one JSON object. Exit
code 1 when a bar does not hold.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table

from nvlm_deploy.model.image_tiler import ImageTiler
from nvlm_deploy.model.spec import IMAGENET_MEAN, IMAGENET_STD, TilingSpec
from nvlm_deploy.model.tiling import choose_grid
from nvlm_deploy.report.device import device_name
from nvlm_deploy.report.measurement import Bar, Measurement, Verdict, all_hold
from nvlm_deploy.report.tables import verdict_table

RELEASED = TilingSpec(tile_size=448, min_tiles=1, max_tiles=6, use_thumbnail=True, tokens_per_tile=256)
MEAN, DEVIATION = (np.array(values, np.float32) for values in (IMAGENET_MEAN, IMAGENET_STD))
# rounds of each size: the shorter a way takes, the more a neighbour's work disturbs it
ROUNDS = {(640, 480): 31, (1920, 1080): 21, (4032, 3024): 7}
IMAGES_PER_REQUEST = (1, 4)
THREADS = (1, 2)
SPEEDUP_BARS = {1: 1.7, 2: 3.0}
# The same bits need Pillow's decode and both resizes; the larger a photograph and the fewer its tiles, the more of the
# reference's time they are: 1920x1080 becomes 3 tiles (a 2x1 grid), 4032x3024 has 12 megapixels to read. Their ceilings
# (reference over floor) lie under the bars, so they are judged by the floor alone.
SIZES_WITH_SPEEDUP_BARS = ((640, 480),)
LARGEST_OVERHEAD = {1: 1.15, 2: 1.2}

Way = Callable[[Sequence[bytes]], object]
REFERENCE, CARD = "reference", "card"


@dataclass(frozen=True)
class Times:
    """Seconds of every way, round by round."""

    size: tuple[int, int]
    images: int
    seconds: Mapping[str, Sequence[float]]

    @property
    def title(self) -> str:
        return f"{self.size[0]}x{self.size[1]}, {self.images} per request"

    def median_ms(self, way: str) -> float:
        return 1000 * median(self.seconds[way])

    def least_ms(self, way: str) -> float:
        return 1000 * min(self.seconds[way])

    def ratio(self, way: str, other: str) -> float:
        """Of the least times: what a neighbour's work adds to a round is not the way's own."""
        return min(self.seconds[way]) / min(self.seconds[other])

    def speedup(self, threads: int) -> float:
        """The reference, on its one thread, over ours."""
        return self.ratio(REFERENCE, ours(threads))

    def ceiling(self, threads: int) -> float:
        """The speedup of a way that does nothing but decode and resize."""
        return self.ratio(REFERENCE, floor(threads))

    def overhead(self, threads: int) -> float:
        return self.ratio(ours(threads), floor(threads))


def ours(threads: int) -> str:
    return f"ours x{threads}"


def floor(threads: int) -> str:
    return f"floor x{threads}"


def photograph(width: int, height: int, seed: int) -> bytes:
    """A JPEG of soft shapes with a sensor's noise, about 0.4 bytes per pixel."""
    random = np.random.default_rng(seed)
    shapes = Image.fromarray(random.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
    pixels = np.asarray(shapes.resize((width, height))) // 2 + random.integers(0, 20, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


def card_tiles(encoded: bytes) -> list[Image.Image]:
    """The model card's `load_image` and `dynamic_preprocess` (facts nvlm-d.md section 4)."""
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    size, grid = RELEASED.tile_size, choose_grid(*image.size, RELEASED)
    resized = image.resize((size * grid.columns, size * grid.rows))
    corners = [(column * size, row * size) for row in range(grid.rows) for column in range(grid.columns)]
    tiles = [resized.crop((left, top, left + size, top + size)) for left, top in corners]
    if len(tiles) != 1:
        tiles.append(image.resize((size, size)))
    return tiles


def card_floats(tile: Image.Image) -> torch.Tensor:
    """The card's transform: what torchvision's Resize, ToTensor and Normalize do, operation by operation."""
    size = RELEASED.tile_size
    same = tile.resize((size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(same)).permute(2, 0, 1).contiguous()
    mean, deviation = (torch.from_numpy(values)[:, None, None] for values in (MEAN, DEVIATION))
    return pixels.to(torch.float32).div(255).clone().sub_(mean).div_(deviation)


def card_way(images: Sequence[bytes]) -> torch.Tensor:
    """float32 [tiles, 3, 448, 448]."""
    return torch.stack([card_floats(tile) for encoded in images for tile in card_tiles(encoded)])


def reference_way(images: Sequence[bytes]) -> np.ndarray:
    """float32 [tiles, 3, 448, 448], normalised in numpy."""
    tiles = [np.asarray(tile, np.float32) for encoded in images for tile in card_tiles(encoded)]
    return np.stack([((tile / 255 - MEAN) / DEVIATION).transpose(2, 0, 1) for tile in tiles])


def decode_and_resize(encoded: bytes) -> None:
    """The floor: what the same bits cannot do without."""
    image = Image.open(io.BytesIO(encoded))
    image.load()
    size, grid = RELEASED.tile_size, choose_grid(*image.size, RELEASED)
    image.resize((size * grid.columns, size * grid.rows))
    image.resize((size, size))


def measured(size: tuple[int, int], images: int) -> Times:
    """Every way once per round, in turn, so that a slow moment of the machine hits all of them."""
    request = [photograph(*size, seed) for seed in range(images)]
    with ExitStack() as stack:
        ways: dict[str, Way] = {REFERENCE: reference_way, CARD: card_way}
        for threads in THREADS:
            pool = stack.enter_context(ThreadPoolExecutor(threads))
            tiler = stack.enter_context(closing(ImageTiler(RELEASED, threads=threads)))
            ways[floor(threads)] = lambda images, pool=pool: list(pool.map(decode_and_resize, images))
            ways[ours(threads)] = tiler.tiles
        rounds = [{name: seconds_of(way, request) for name, way in ways.items()} for _ in range(ROUNDS[size])]
    return Times(size, images, {name: [seconds[name] for seconds in rounds] for name in ways})


def seconds_of(way: Way, request: Sequence[bytes]) -> float:
    start = perf_counter()
    way(request)
    return perf_counter() - start


def identity_verdict(size: tuple[int, int], threads: int) -> Verdict:
    """Tiles, before normalisation, in which any bit differs from the card's."""
    request = [photograph(*size, seed) for seed in range(max(IMAGES_PER_REQUEST))]
    with closing(ImageTiler(RELEASED, threads=threads)) as tiler:
        tiles, _ = tiler.tiles(request)
    expected = [np.asarray(tile) for encoded in request for tile in card_tiles(encoded)]
    different = sum(not np.array_equal(*pair) for pair in zip(tiles, expected, strict=True))
    name = f"{size[0]}x{size[1]}, x{threads}: tiles unlike the card's"
    return Verdict(Measurement(name, different, "", len(expected)), Bar("at most", 0))


def overhead_verdict(times: Times, threads: int) -> Verdict:
    name = f"{times.title}, x{threads}: time over floor"
    return Verdict(
        Measurement(name, times.overhead(threads), "x", ROUNDS[times.size]), Bar("at most", LARGEST_OVERHEAD[threads])
    )


def speedup_verdict(times: Times, threads: int) -> Verdict:
    name = f"{times.title}, x{threads}: speedup"
    return Verdict(
        Measurement(name, times.speedup(threads), "x", ROUNDS[times.size]), Bar("at least", SPEEDUP_BARS[threads])
    )


def verdicts(found: Sequence[Times]) -> Iterator[Verdict]:
    """Every bar, judged: on the requests of many images, as one image has too little for two threads."""
    for times in found:
        if times.images != max(IMAGES_PER_REQUEST):
            continue
        for threads in THREADS:
            yield identity_verdict(times.size, threads)
            yield overhead_verdict(times, threads)
            if times.size in SIZES_WITH_SPEEDUP_BARS:
                yield speedup_verdict(times, threads)


def times_table(found: Sequence[Times]) -> Table:
    """Least times; a speedup stands beside its ceiling."""
    table = Table("ms (least)", *found[0].seconds, box=box.SIMPLE_HEAD, pad_edge=False)
    for threads in THREADS:
        table.add_column(f"speedup x{threads}")
    for times in found:
        cells = [f"{times.least_ms(way):.0f}" for way in times.seconds]
        cells += [f"{times.speedup(threads):.2f} of {times.ceiling(threads):.2f}" for threads in THREADS]
        table.add_row(times.title, *cells)
    return table


def as_json(times: Times) -> dict[str, Any]:
    return {
        "median_ms": {way: times.median_ms(way) for way in times.seconds},
        "least_ms": {way: times.least_ms(way) for way in times.seconds},
        "card_over_ours": {f"x{threads}": times.ratio(CARD, ours(threads)) for threads in THREADS},
        "speedup": {f"x{threads}": times.speedup(threads) for threads in THREADS},
        "ceiling": {f"x{threads}": times.ceiling(threads) for threads in THREADS},
        "over_floor": {f"x{threads}": times.overhead(threads) for threads in THREADS},
    }


def main() -> int:
    torch.set_num_threads(1)
    found = [measured(size, images) for size in ROUNDS for images in IMAGES_PER_REQUEST]
    judged = list(verdicts(found))
    console = Console(width=100)
    console.print(times_table(found))
    console.print(verdict_table(judged))
    results = {times.title: as_json(times) for times in found}
    bars = [verdict.as_json() for verdict in judged]
    print(json.dumps({"name": "preprocess", "device": device_name(), "results": results, "bars": bars}))
    return 0 if all_hold(judged) else 1


if __name__ == "__main__":
    sys.exit(main())
