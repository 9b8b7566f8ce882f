"""An image becomes uint8 tiles, bit for bit as the reference does it (facts nvlm-d.md section 4)."""

from __future__ import annotations

import io
import threading
import warnings
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.model.spec import TilingSpec

if TYPE_CHECKING:
    from PIL import Image

# 89 megapixels is Pillow's own warning level: a 360 MB bitmap, as Pillow holds an RGB pixel in 4 bytes.
MAX_PIXELS = 89_000_000
READABLE_FORMATS = ("JPEG", "PNG", "WEBP")

# warnings.catch_warnings changes the whole process and may not overlap itself
_warnings_lock = threading.Lock()


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
    image = opened(encoded, max_pixels)
    try:
        return _decoded(image)
    except Exception as problem:  # Pillow raises OSError, SyntaxError, struct.error and more on damaged files
        raise NvlmError(f"the image is damaged or truncated: {problem}") from problem


def opened(encoded: bytes, max_pixels: int) -> Image.Image:
    """An image whose header alone is read and judged."""
    from PIL import Image, UnidentifiedImageError

    if not encoded:
        raise NvlmError("the image is empty (0 bytes)")
    try:
        with _warnings_lock, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(encoded), formats=READABLE_FORMATS)
    except UnidentifiedImageError:
        raise NvlmError(f"not an image: {len(encoded)} bytes that are no {', '.join(READABLE_FORMATS)} file") from None
    except Image.DecompressionBombError:  # Pillow's own limit, twice its warning level
        raise _too_large("more than 2 x 89 million pixels", max_pixels) from None
    except Exception as problem:
        raise NvlmError(f"the image cannot be opened: {problem}") from problem
    _require_sane_size(image.size, max_pixels)
    return image


def _decoded(image: Image.Image) -> Image.Image:
    image.load()
    if image.mode == "RGB":  # converting it would copy it: 49 MB for 12 megapixels
        return image
    return _eight_bits(image).convert("RGB")


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
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    tiles = room_for(tile_count(*rgb.size, tiling), tiling)
    write_tiles(rgb, tiling, tiles)
    return tiles


def room_for(tiles: int, tiling: TilingSpec) -> npt.NDArray[np.uint8]:
    """uint8 [tiles, tile_size, tile_size, 3], to be written."""
    return np.empty((tiles, tiling.tile_size, tiling.tile_size, 3), dtype=np.uint8)


def write_tiles(rgb: Image.Image, tiling: TilingSpec, tiles: npt.NDArray[np.uint8]) -> None:
    """As `tiles_from_image`, into room that is there."""
    write_grid(rgb, tiling, tiles)
    write_thumbnail(rgb, tiling, tiles)


def write_grid(rgb: Image.Image, tiling: TilingSpec, tiles: npt.NDArray[np.uint8]) -> None:
    """All but the thumbnail, into the first of `tiles`."""
    from PIL import Image

    size, grid = tiling.tile_size, choose_grid(*rgb.size, tiling)
    resized = rgb.resize((size * grid.columns, size * grid.rows), Image.Resampling.BICUBIC)
    for index in range(grid.tiles):
        row, column = divmod(index, grid.columns)
        left, top = column * size, row * size
        # tile by tile: one array of the whole grid took 5 times as long, its 4 MB being new memory at every call
        tiles[index] = np.asarray(resized.crop((left, top, left + size, top + size)))


def write_thumbnail(rgb: Image.Image, tiling: TilingSpec, tiles: npt.NDArray[np.uint8]) -> None:
    """The whole image into the last of `tiles`, if it has a thumbnail: also from the full image, for the same bits."""
    from PIL import Image

    if len(tiles) > choose_grid(*rgb.size, tiling).tiles:
        tiles[-1] = np.asarray(rgb.resize((tiling.tile_size, tiling.tile_size), Image.Resampling.BICUBIC))
