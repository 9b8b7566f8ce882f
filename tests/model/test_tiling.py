"""Tiles against the reference's count vectors, transformers' GotOcr2 tile logic, and Pillow itself."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.image_file.limits import ImageLimits
from nvlm_deploy.image_file.reading import ImageReading
from nvlm_deploy.image_file.structure import ImageStructure
from nvlm_deploy.model import image_tiler
from nvlm_deploy.model.image_tiler import ImageTiler
from nvlm_deploy.model.spec import TilingSpec
from nvlm_deploy.model.tiling import candidate_grids, choose_grid, tile_count, tiles_from_image

RELEASED = TilingSpec(tile_size=448, min_tiles=1, max_tiles=6, use_thumbnail=True, tokens_per_tile=256)
SMALL = TilingSpec(tile_size=56, min_tiles=1, max_tiles=6, use_thumbnail=True, tokens_per_tile=4)

# facts nvlm-d.md section 4: sizes, grid, tiles with thumbnail, visual tokens
COUNT_VECTORS = """
1x1 100x100 336x336 448x448 447x449 600x600 633x633 : 1x1 1 256
634x634 896x896 1024x1024 2000x2000 : 2x2 5 1280
640x512 : 1x1 1 256
800x640 : 2x2 5 1280
1280x1024 : 3x2 7 1792
512x640 1024x1280 : 2x3 7 1792
640x480 800x600 1024x768 1600x1200 1344x896 : 3x2 7 1792
1280x720 1920x1080 3840x2160 896x448 : 2x1 3 768
720x1280 1080x1920 448x896 : 1x2 3 768
350x200 700x400 : 2x1 3 768
1400x800 : 3x2 7 1792
500x200 : 2x1 3 768
1000x400 1250x500 1344x448 : 3x1 4 1024
1792x448 : 4x1 5 1280
2240x448 : 5x1 6 1536
2688x448 3000x500 10000x100 : 6x1 7 1792
500x3000 100x10000 : 1x6 7 1792
2480x3508 1654x2339 850x1100 1700x2200 300x500 896x1344 : 2x3 7 1792
"""


def _vectors() -> list[tuple[str, str, int, int]]:
    rows = []
    for line in COUNT_VECTORS.strip().splitlines():
        sizes, expected = line.split(":")
        grid, tiles, tokens = expected.split()
        rows += [(size, grid, int(tiles), int(tokens)) for size in sizes.split()]
    return rows


def _pair(text: str) -> tuple[int, int]:
    width, height = text.split("x")
    return int(width), int(height)


@pytest.mark.parametrize(("size", "grid", "tiles", "tokens"), _vectors())
def test_the_count_vectors_of_the_facts(size, grid, tiles, tokens):
    assert choose_grid(*_pair(size), RELEASED) == _pair(grid)
    assert tile_count(*_pair(size), RELEASED) == tiles
    assert tiles * RELEASED.tokens_per_tile == tokens


def test_there_are_the_fourteen_grids_of_the_paper():
    names = ["1x1", "1x2", "2x1", "1x3", "3x1", "1x4", "2x2", "4x1", "1x5", "5x1", "1x6", "2x3", "3x2", "6x1"]
    assert candidate_grids(RELEASED) == [_pair(name) for name in names]


def test_a_square_splits_once_it_fills_half_of_four_tiles_which_is_from_634_pixels_on():
    assert choose_grid(633, 633, RELEASED) == (1, 1)
    assert choose_grid(634, 634, RELEASED) == (2, 2)


@pytest.mark.parametrize(
    ("ratio", "threshold", "below", "above"),
    [
        ((5, 4), 401_408, (1, 1), (2, 2)),
        ((5, 4), 602_112, (2, 2), (3, 2)),
        ((7, 4), 602_112, (2, 1), (3, 2)),
        ((5, 2), 301_056, (2, 1), (3, 1)),
    ],
)
def test_an_exact_tie_of_ratios_goes_to_more_tiles_above_half_their_area(ratio, threshold, below, above):
    factor = int((threshold / (ratio[0] * ratio[1])) ** 0.5)
    assert factor**2 * ratio[0] * ratio[1] <= threshold
    assert choose_grid(ratio[0] * factor, ratio[1] * factor, RELEASED) == below
    assert choose_grid(ratio[0] * (factor + 1), ratio[1] * (factor + 1), RELEASED) == above


def _transformers_count(width: int, height: int, spec: TilingSpec) -> int:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    size = {"height": spec.tile_size, "width": spec.tile_size}
    choice = {"min_patches": spec.min_tiles, "max_patches": spec.max_tiles, "patch_size": size}
    return GotOcr2ImageProcessorPil().get_number_of_image_patches(height, width, {**choice, "crop_to_patches": True})


@pytest.mark.slow
@pytest.mark.parametrize("spec", [RELEASED, SMALL], ids=["released", "small"])
@pytest.mark.needs("test")
def test_tile_counts_equal_transformers_got_ocr2_over_random_sizes(spec):
    random = np.random.default_rng(0)
    sizes = np.exp(random.uniform(0, np.log(8 * spec.tile_size), (1500, 2))).astype(int) + 1
    squares = random.integers(1, 3 * spec.tile_size, 200)
    for width, height in [*sizes.tolist(), *((side, side) for side in squares.tolist())]:
        assert tile_count(width, height, spec) == _transformers_count(width, height, spec), (width, height)


@pytest.mark.parametrize(("size", "tiles"), [((20, 20), 1), ((60, 60), 10)])
def test_the_counts_that_transformers_tests_itself_with(size, tiles):
    spec = TilingSpec(tile_size=20, min_tiles=1, max_tiles=12, use_thumbnail=True, tokens_per_tile=1)
    assert tile_count(*size, spec) == tiles


def test_trap_8_six_tiles_and_a_thumbnail_are_the_most_not_twelve(tiny_spec):
    assert tiny_spec.tiling.max_tiles == 6
    assert max(tile_count(width, 448, RELEASED) for width in range(100, 6000, 50)) == 7
    assert RELEASED.max_tiles_with_thumbnail == 7


def _picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(width * 10_000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def _reference_tiles(image: Image.Image, columns: int, rows: int, size: int) -> np.ndarray:
    """The card's `dynamic_preprocess`, in Pillow: resize, crop boxes, thumbnail last; no filter named, as there."""
    image = image.convert("RGB")
    resized = image.resize((size * columns, size * rows))
    tiles = []
    for index in range(columns * rows):
        left, top = index % columns * size, index // columns * size
        tiles.append(resized.crop((left, top, left + size, top + size)))
    if len(tiles) != 1:
        tiles.append(image.resize((size, size)))
    return np.stack([np.asarray(tile) for tile in tiles])


@pytest.mark.parametrize(
    "size", ["56x56", "1x1", "40x300", "300x40", "168x112", "75x75", "80x80", "112x112", "201x97", "640x480", "33x500"]
)
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_tiles_are_bit_identical_to_the_reference_steps_in_pillow(size, mode):
    image = _picture(*_pair(size), mode)
    expected = _reference_tiles(image, *choose_grid(*image.size, SMALL), SMALL.tile_size)
    found = tiles_from_image(image, SMALL)
    assert found.dtype == np.uint8
    assert np.array_equal(found, expected)


def test_a_full_size_photograph_is_bit_identical_too():
    image = _picture(1600, 1200)
    assert np.array_equal(tiles_from_image(image, RELEASED), _reference_tiles(image, 3, 2, 448))


def test_tiles_go_left_to_right_then_down_and_the_thumbnail_is_last():
    image = Image.new("RGB", (168, 112))
    for index in range(6):
        image.paste(
            (40 * (index + 1),) * 3, (index % 3 * 56, index // 3 * 56, index % 3 * 56 + 56, index // 3 * 56 + 56)
        )
    tiles = tiles_from_image(image, SMALL)
    assert [int(tile[28, 28, 0]) for tile in tiles[:6]] == [40, 80, 120, 160, 200, 240]
    assert tiles[6][5, 5, 0] == 40
    assert tiles[6][50, 50, 0] == 240


def test_a_single_tile_gets_no_thumbnail():
    assert tiles_from_image(_picture(56, 56), SMALL).shape == (1, 56, 56, 3)


def test_a_wide_image_gets_more_columns_than_rows():
    grid = choose_grid(1344, 448, RELEASED)
    assert (grid.columns, grid.rows, grid.tiles) == (3, 1, 3)


def _file(width: int, height: int, mode: str = "RGB", format_name: str = "PNG") -> bytes:
    file = io.BytesIO()
    _picture(width, height, mode).save(file, format_name)
    return file.getvalue()


def _reference_tiles_of_file(encoded: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(encoded))
    return _reference_tiles(image, *choose_grid(*image.size, SMALL), SMALL.tile_size)


@pytest.fixture(scope="module", params=[1, 2, 8], ids=lambda threads: f"{threads} threads")
def tiler(request) -> Iterator[ImageTiler]:
    limits = ImageLimits(max_image_pixels=200_000)
    made = ImageTiler(SMALL, threads=request.param, reading=ImageReading("reference", limits=limits))
    yield made
    made.close()


SIDES = st.integers(1, 400)
FILES = st.one_of(
    st.builds(_file, SIDES, SIDES, st.sampled_from(["RGB", "L", "P", "RGBA", "LA", "1"])),
    st.builds(_file, SIDES, SIDES, st.sampled_from(["RGB", "L", "CMYK"]), st.just("JPEG")),
    st.builds(_file, SIDES, SIDES, st.sampled_from(["RGB", "RGBA"]), st.just("WEBP")),
)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(images=st.lists(FILES, max_size=5))
def test_a_request_of_any_files_is_tiled_bit_for_bit_in_its_order_on_any_number_of_threads(tiler, images):
    tiles, counts = tiler.tiles(images)
    expected = [_reference_tiles_of_file(encoded) for encoded in images]
    assert counts == [len(part) for part in expected]
    assert np.array_equal(tiles, np.concatenate([np.empty((0, 56, 56, 3), np.uint8), *expected]))


def test_no_images_are_no_tiles(tiler):
    tiles, counts = tiler.tiles([])
    assert (tiles.shape, tiles.dtype, counts) == ((0, 56, 56, 3), np.uint8, [])


DAMAGED = _file(300, 200)[:-4000]
BAD_HEADER = b"nonsense"
TOO_LARGE = _file(500, 401)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ([DAMAGED, BAD_HEADER], "image 2 of 2: not an image"),
        ([DAMAGED, _file(9, 9)], "image 1 of 2: the image is damaged or truncated"),
        ([BAD_HEADER, DAMAGED], "image 1 of 2: not an image"),
        ([_file(9, 9), TOO_LARGE, DAMAGED], "image 2 of 3: the image has 500 x 401 pixels"),
        ([_file(300, 300)] * 7 + [DAMAGED, DAMAGED], "image 8 of 9: the image is damaged"),
        ([b""], "image 1 of 1: the image is empty"),
    ],
    ids=["headers come first", "damaged first", "no image first", "too large first", "the eighth", "no bytes"],
)
def test_the_first_bad_image_is_named_however_it_is_bad(tiler, images, words):
    for _ in range(10):
        with pytest.raises(NvlmError, match=words):
            tiler.tiles(images)


def test_the_hint_of_an_image_is_kept(tiler):
    with pytest.raises(NvlmError) as failure:
        tiler.tiles([TOO_LARGE])
    assert "scale it down" in (failure.value.hint or "")


def test_after_an_error_the_next_request_is_served_as_if_nothing_had_been(tiler):
    good = [_file(200, 90), _file(90, 200)]
    before, _ = tiler.tiles(good)
    with pytest.raises(NvlmError):
        tiler.tiles([*good, DAMAGED, *good])
    assert np.array_equal(tiler.tiles(good)[0], before)


class Watched:
    """Counts how many images are open in threads at once."""

    def __init__(self, monkeypatch, *, wait_for: int) -> None:
        self.decoded, self.write_tiles = image_tiler.decoded, image_tiler.write_tiles
        self.lock = threading.Lock()
        self.meeting = threading.Barrier(wait_for)
        self.held = self.most = 0
        monkeypatch.setattr(image_tiler, "decoded", self.opened)
        monkeypatch.setattr(image_tiler, "write_tiles", self.written)

    def opened(self, structure: ImageStructure, reading: ImageReading) -> Image.Image:
        with self.lock:
            self.held += 1
            self.most = max(self.most, self.held)
        self.meeting.wait(timeout=30)
        return self.decoded(structure, reading)

    def written(self, *arguments) -> None:
        self.write_tiles(*arguments)
        with self.lock:
            self.held -= 1


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_as_many_images_are_decoded_at_once_as_there_are_threads_and_never_more(monkeypatch, threads):
    watched = Watched(monkeypatch, wait_for=threads)
    tiler = ImageTiler(SMALL, threads=threads)
    tiler.tiles([_file(60, 40)] * 3 * threads)
    tiler.close()
    assert (watched.most, watched.held) == (threads, 0)


def test_nothing_runs_any_more_when_the_error_is_raised(monkeypatch):
    watched = Watched(monkeypatch, wait_for=1)
    tiler = ImageTiler(SMALL, threads=4)
    with pytest.raises(NvlmError, match="image 1 of 40"):
        tiler.tiles([DAMAGED] + [_file(300, 300)] * 39)
    left = watched.held
    tiler.close()
    assert left == watched.held == 1  # the damaged one, which was never written


def test_opening_images_in_threads_leaves_the_process_warnings_as_they_were(monkeypatch):
    """`warnings.catch_warnings` changes the whole process and may not overlap itself."""
    opened = image_tiler.decoded

    def open_slowly(*arguments) -> Image.Image:
        image = opened(*arguments)
        time.sleep(0.001)  # other threads come in between
        return image

    monkeypatch.setattr(image_tiler, "decoded", open_slowly)
    before = list(warnings.filters)
    tiler = ImageTiler(SMALL, threads=8)
    tiler.tiles([_file(5, 5)] * 32)
    tiler.close()
    assert list(warnings.filters) == before


def test_a_tiler_that_was_never_closed_does_not_keep_the_process():
    code = (
        "from nvlm_deploy.model.image_tiler import ImageTiler, TilingSpec\n"
        "spec = TilingSpec(tile_size=56, min_tiles=1, max_tiles=6, use_thumbnail=True, tokens_per_tile=4)\n"
        "tiler = ImageTiler(spec, threads=4)\n"
        "tiler._run([int] * 8)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_no_threads_are_refused():
    with pytest.raises(NvlmError, match="0 threads to prepare images"):
        ImageTiler(SMALL, threads=0)
