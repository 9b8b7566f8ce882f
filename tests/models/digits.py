"""Real handwritten digits as pictures and questions: scikit-learn's 1,797 scans, one digit per tile of a grid."""

from __future__ import annotations

import io
import random
import zlib
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

from nvlm_deploy.model.spec import TilingSpec
from nvlm_deploy.model.tiling import choose_grid

TILE = 56
TILING = TilingSpec(tile_size=TILE, min_tiles=1, max_tiles=6, use_thumbnail=True, tokens_per_tile=4)
GRIDS = [(columns, rows) for columns in range(1, 7) for rows in range(1, 7) if columns * rows <= TILING.max_tiles]
IMAGE_TASKS = ("tile", "read", "count", "largest")
TASKS = (*IMAGE_TASKS, "text")
HELD_OUT_SHARE = 0.2
LARGEST_ADDEND = 49
# Training bends the 1,437 scans it has further than anybody writes; unseen scans are bent about as much as people do.
HELD_OUT_STRENGTH = 0.6


@dataclass(frozen=True)
class Scan:
    """One handwritten digit: ink `[8, 8]` uint8, 255 is full ink."""

    ink: NDArray[np.uint8]
    digit: int


@dataclass(frozen=True)
class Picture:
    """A grid of digits, row by row; whatever its size in pixels, the tiling algorithm finds the grid again."""

    image: Image.Image
    columns: int
    rows: int
    digits: tuple[int, ...]


@dataclass(frozen=True)
class Sample:
    """One question with its exact answer; a text-only question has no image (an encoded file) and no digits."""

    question: str
    answer: str
    task: str
    image: bytes | None = None
    digits: tuple[int, ...] = ()


@cache
def scans(held_out: bool) -> tuple[tuple[Scan, ...], ...]:
    """The scans of one side of the split, `[digit][index]`; the split is by scan and never changes."""
    bunch = load_digits()
    chosen = np.random.default_rng(1797).permutation(len(bunch.target)) < HELD_OUT_SHARE * len(bunch.target)
    by_digit: list[list[Scan]] = [[] for _ in range(10)]
    for ink, digit, out in zip(bunch.images, bunch.target, chosen, strict=True):
        if bool(out) == held_out:
            by_digit[digit].append(Scan(np.round(ink * 255 / 16).astype(np.uint8), int(digit)))
    return tuple(tuple(group) for group in by_digit)


def text_held_out(first: int, second: int) -> bool:
    """Whether this sum is kept out of training, in both orders."""
    low, high = sorted((first, second))
    return zlib.crc32(f"{low}+{high}".encode()) % 10 == 0


class PictureMaker:
    """Draws pictures and questions from one side of the split; the same seed gives the same sequence."""

    def __init__(self, seed: int, *, held_out: bool) -> None:
        self.held_out = held_out
        self.strength = HELD_OUT_STRENGTH if held_out else 1.0
        self.random = random.Random(seed)
        self.noise = np.random.default_rng(seed)

    def picture(self, grid: tuple[int, int], digits: tuple[int, ...] | None = None) -> Picture:
        """A picture of `grid` (columns, rows) with new scans of `digits` (drawn when not given)."""
        columns, rows = grid
        digits = digits or self.digits(columns * rows)
        ink = np.zeros((rows * TILE, columns * TILE), np.float32)
        for index, digit in enumerate(digits):
            top, left = index // columns * TILE, index % columns * TILE
            ink[top : top + TILE, left : left + TILE] = self.drawn_ink(digit)
        image = self._photographed(self._resized(self._coloured(ink), grid))
        return Picture(image, columns, rows, digits)

    def digits(self, count: int) -> tuple[int, ...]:
        """Digits to show; half of the pictures repeat a few, so that counting has something to count."""
        pool = range(10) if self.random.random() < 0.5 else self.random.sample(range(10), self.random.randint(1, 3))
        return tuple(self.random.choice(pool) for _ in range(count))

    def drawn_ink(self, digit: int) -> NDArray[np.float32]:
        """One tile of ink in 0..1 `[56, 56]`: a scan turned, sheared, bent, shifted, resized, thickened or thinned."""
        scan = self.random.choice(scans(self.held_out)[digit])
        angle, shear = np.radians(self._jitter(12)), self._jitter(0.16)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        size = np.diag([0.79 + self._jitter(0.14), 0.79 + self._jitter(0.14)]) * TILE / 8
        (a, b), (c, d) = turn @ np.array([[1.0, shear], [0.0, 1.0]]) @ size
        to_scan = np.array([[d, -b], [-c, a]]) / (a * d - b * c)
        centre = np.array([TILE / 2 + self._jitter(4), TILE / 2 + self._jitter(4)])
        # Empty paper around the scan: bicubic needs neighbours, and a turned scan must not be cut straight.
        padded = Image.fromarray(np.pad(scan.ink, 4))
        corners = [to_scan @ (np.array(corner) - centre) + 8 for corner in ((0, 0), (0, TILE), (TILE, TILE), (TILE, 0))]
        bent = tuple(float(value + self._jitter(0.5)) for corner in corners for value in corner)
        tile = padded.transform((TILE, TILE), Image.Transform.QUAD, bent, Image.Resampling.BICUBIC)
        return (np.asarray(tile, np.float32) / 255) ** np.float32(np.exp(self._jitter(0.45)))

    def _jitter(self, reach: float) -> float:
        return self.strength * self.random.uniform(-reach, reach)

    def _coloured(self, ink: NDArray[np.float32]) -> Image.Image:
        dark = self.noise.uniform(0, 90, 3).astype(np.float32)
        light = self.noise.uniform(165, 255) + self.noise.uniform(-20, 20, 3).astype(np.float32)
        paper, pen = (light, dark) if self.random.random() < 0.75 else (dark, light)
        pixels = paper + ink[..., None] * (pen - paper)
        if self.random.random() < 0.7:
            grain = self.noise.standard_normal(ink.shape, dtype=np.float32)[..., None]
            pixels = pixels + grain * np.float32(self.random.uniform(0, 18) * self.strength)
        return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))

    def _resized(self, image: Image.Image, grid: tuple[int, int]) -> Image.Image:
        """Two pictures in five take another size that the tiling algorithm still reads as the same grid."""
        if self.random.random() < 0.6:
            return image
        scale, stretch = self.random.uniform(0.7, 2.4), self.random.uniform(0.93, 1.07)
        size = max(1, round(image.width * scale * stretch)), max(1, round(image.height * scale / stretch))
        return image.resize(size) if choose_grid(*size, TILING) == grid else image

    def _photographed(self, image: Image.Image) -> Image.Image:
        if self.random.random() < 0.7:
            return image
        return Image.open(io.BytesIO(encoded(image, quality=self.random.randint(60, 95)))).convert("RGB")

    def question(self, task: str, digits: tuple[int, ...]) -> tuple[str, str]:
        """Question and answer of one task; `digits` in the order of their tile tags."""
        draw = self.random
        if task == "tile":
            tile = draw.randrange(len(digits))
            return f"Which digit is in tile {tile + 1}?", str(digits[tile])
        if task == "read":
            return "Read all digits in order.", " ".join(map(str, digits))
        if task == "count":
            digit = draw.choice(digits) if draw.random() < 0.8 else draw.randrange(10)
            return f"How many tiles show the digit {digit}?", str(digits.count(digit))
        if task == "largest":
            return "Which digit is the largest?", str(max(digits))
        return self.sum()

    def sum(self) -> tuple[str, str]:
        """A sum of two numbers from this side of the split of sums."""
        while True:
            first, second = self.random.randint(0, LARGEST_ADDEND), self.random.randint(0, LARGEST_ADDEND)
            if text_held_out(first, second) == self.held_out:
                return f"What is {first} plus {second}?", str(first + second)


def encoded(image: Image.Image, *, quality: int = 85) -> bytes:
    """The picture as a JPEG file."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def samples(count: int, *, seed: int, held_out: bool = True) -> list[Sample]:
    """`count` questions, a fifth of each task; the four image questions of a group share one picture."""
    maker = PictureMaker(seed, held_out=held_out)
    found: list[Sample] = []
    while len(found) < count:
        picture = maker.picture(maker.random.choice(GRIDS))
        image = encoded(picture.image)
        for task in TASKS:
            question, answer = maker.question(task, picture.digits)
            on_image = (image, picture.digits) if task in IMAGE_TASKS else (None, ())
            found.append(Sample(question, answer, task, *on_image))
    return found[:count]
