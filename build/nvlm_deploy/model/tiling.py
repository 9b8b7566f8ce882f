"""An image becomes uint8 tiles, bit for bit as the reference does it (facts nvlm-d.md section 4)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from nvlm_deploy.model.spec import TilingSpec

if TYPE_CHECKING:
    from PIL import Image


class Grid(NamedTuple):
    """Tiles across and down."""

    columns: int
    rows: int

    @property
    def tiles(self) -> int:
        return self.columns * self.rows


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
