"""An image becomes uint8 tiles, bit for bit as the reference does it (facts nvlm-d.md section 4)."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.model.spec import TilingSpec

if TYPE_CHECKING:
    from PIL import Image

# 89 megapixels is Pillow's own warning level: a 300 MB bitmap. A decoded image costs 3 bytes per pixel.
MAX_PIXELS = 89_000_000
READABLE_FORMATS = ("JPEG", "PNG", "WEBP")


class Grid(NamedTuple):
    """Tiles across and down."""

    columns: int
    rows: int

    @property
    def tiles(self) -> int:
        return self.columns * self.rows


def open_image(encoded: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a JPEG, PNG or WebP file to RGB, whole; EXIF rotation is not applied, as in the reference.

    Raises NvlmError for bytes that are no such file, a truncated file, or more than `max_pixels` pixels. The size is
    judged from the header, before any pixel is decoded.
    """
    from PIL import Image, UnidentifiedImageError

    if not encoded:
        raise NvlmError("the image is empty (0 bytes)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(encoded), formats=READABLE_FORMATS)
    except UnidentifiedImageError:
        raise NvlmError(f"not an image: {len(encoded)} bytes that are no {', '.join(READABLE_FORMATS)} file") from None
    except Image.DecompressionBombError:  # Pillow's own limit, twice its warning level
        raise _too_large("more than 2 x 89 million pixels", max_pixels) from None
    except Exception as problem:
        raise NvlmError(f"the image cannot be opened: {problem}") from problem
    _require_sane_size(image.size, max_pixels)
    try:
        return _eight_bits(image).convert("RGB")
    except Exception as problem:  # Pillow raises OSError, SyntaxError, struct.error and more on damaged files
        raise NvlmError(f"the image is damaged or truncated: {problem}") from problem


def _eight_bits(image: Image.Image) -> Image.Image:
    """A 16-bit grey picture scaled down; Pillow's own conversion would clip all above 255 to white."""
    from PIL import Image

    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image) // 256).astype(np.uint8))


def _require_sane_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise NvlmError(f"the image has {width} x {height} pixels")
    if width * height > max_pixels:
        raise _too_large(f"{width} x {height} pixels", max_pixels)


def _too_large(found: str, max_pixels: int) -> NvlmError:
    return NvlmError(
        f"the image has {found}, more than the {max_pixels:,} that are decoded",
        hint="scale it down first: the model never sees more than its tiles",
    )


def candidate_grids(tiling: TilingSpec) -> list[Grid]:
    """Every grid of min_tiles..max_tiles tiles, fewest tiles first (stable in columns)."""
    sides = range(1, tiling.max_tiles + 1)
    grids = [Grid(columns, rows) for columns in sides for rows in sides]
    allowed = [grid for grid in grids if tiling.min_tiles <= grid.tiles <= tiling.max_tiles]
    return sorted(allowed, key=lambda grid: grid.tiles)


def choose_grid(width: int, height: int, tiling: TilingSpec) -> Grid:
    """The grid nearest in aspect ratio; an exact tie goes to more tiles when the image fills over half of them."""
    aspect_ratio = width / height
    best, best_difference = Grid(1, 1), float("inf")
    for grid in candidate_grids(tiling):
        difference = abs(aspect_ratio - grid.columns / grid.rows)
        fills_half = width * height > 0.5 * tiling.tile_size**2 * grid.tiles
        if difference < best_difference or (difference == best_difference and fills_half):
            best, best_difference = grid, difference
    return best


def tile_count(width: int, height: int, tiling: TilingSpec) -> int:
    """Tiles of an image, its thumbnail included."""
    tiles = choose_grid(width, height, tiling).tiles
    return tiles + 1 if tiling.use_thumbnail and tiles > 1 else tiles


def tiles_from_image(image: Image.Image, tiling: TilingSpec) -> npt.NDArray[np.uint8]:
    """uint8 [tiles, tile_size, tile_size, 3], left to right, top to bottom, thumbnail last.

    Resizing is Pillow's antialiased bicubic without keeping the aspect ratio; normalisation is the engine's work.
    """
    from PIL import Image

    size = tiling.tile_size
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    grid = choose_grid(*rgb.size, tiling)
    resized = rgb.resize((size * grid.columns, size * grid.rows), Image.Resampling.BICUBIC)
    pixels = np.asarray(resized).reshape(grid.rows, size, grid.columns, size, 3)
    tiles = pixels.transpose(0, 2, 1, 3, 4).reshape(grid.tiles, size, size, 3)
    if not (tiling.use_thumbnail and grid.tiles > 1):
        return np.ascontiguousarray(tiles)
    thumbnail = np.asarray(rgb.resize((size, size), Image.Resampling.BICUBIC))
    return np.concatenate([tiles, thumbnail[None]])
