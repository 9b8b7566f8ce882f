"""Which bytes are an image, and what is said of those that are not."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.model.spec import TilingSpec
from nvlm_deploy.model.tiling import open_image, tiles_from_image

TILING = TilingSpec(tile_size=56, min_tiles=1, max_tiles=6, use_thumbnail=True, tokens_per_tile=4)


def encoded(format_name: str, *, mode: str = "RGB", size: tuple[int, int] = (60, 40), **options: object) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, format_name, **options)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds one empty data chunk."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    ]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP"])
def test_jpeg_png_and_webp_open_as_rgb(format_name):
    image = open_image(encoded(format_name))
    assert (image.mode, image.size) == ("RGB", (60, 40))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "I;16"])
def test_other_colour_modes_become_rgb(mode):
    assert open_image(encoded("PNG", mode=mode)).mode == "RGB"


@pytest.mark.parametrize(("format_name", "mode"), [("PNG", "RGB"), ("JPEG", "RGB"), ("JPEG", "L"), ("WEBP", "RGBA")])
def test_the_pixels_are_those_of_pillows_own_conversion(format_name, mode):
    file = encoded(format_name, mode=mode)
    own = Image.open(io.BytesIO(file)).convert("RGB")
    assert np.array_equal(np.asarray(open_image(file)), np.asarray(own))


def test_exif_rotation_is_not_applied_as_in_the_reference():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to display
    turned = open_image(encoded("JPEG", exif=exif, quality=95))
    assert turned.size == (60, 40)
    assert np.array_equal(
        tiles_from_image(turned, TILING), tiles_from_image(open_image(encoded("JPEG", quality=95)), TILING)
    )


def test_no_bytes_are_an_empty_image():
    with pytest.raises(NvlmError, match="empty"):
        open_image(b"")


@pytest.mark.parametrize(
    "text", [b"hello, I am a text file", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"\0" * 1000]
)
def test_what_is_no_image_is_refused_with_the_formats_that_are_read(text):
    with pytest.raises(NvlmError, match=f"not an image: {len(text)} bytes .*JPEG, PNG, WEBP"):
        open_image(text)


def test_a_format_that_is_not_served_is_refused():
    with pytest.raises(NvlmError, match="not an image"):
        open_image(encoded("GIF"))


@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("kept", [0.5, 0.9])
def test_a_truncated_file_is_refused_and_not_padded_with_grey(format_name, kept):
    whole = encoded(format_name, size=(300, 200))
    with pytest.raises(NvlmError, match=r"truncated|cannot be opened|not an image"):
        open_image(whole[: int(len(whole) * kept)])


def test_a_damaged_jpeg_never_escapes_as_another_exception():
    whole = bytearray(encoded("JPEG", size=(200, 200)))
    random = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(whole)
        for place in random.integers(2, len(whole), 20):
            damaged[place] = random.integers(0, 256)
        try:
            open_image(bytes(damaged))
        except NvlmError as problem:
            assert "image" in problem.message


@pytest.mark.parametrize("size", [(0, 7), (7, 0)])
def test_zero_pixels_are_refused(size):
    with pytest.raises(NvlmError, match=r"0 x 7 pixels|7 x 0 pixels|not an image|cannot be opened"):
        open_image(png_header(*size))


def test_twenty_thousand_squared_pixels_are_refused_from_the_header_alone():
    with pytest.raises(NvlmError, match=r"more than 2 x 89 million pixels, more than the 89,000,000 that are decoded"):
        open_image(png_header(20_000, 20_000))


def test_more_pixels_than_allowed_are_refused_with_both_numbers():
    with pytest.raises(NvlmError, match="60 x 40 pixels, more than the 2,399"):
        open_image(encoded("PNG"), max_pixels=2399)
    assert open_image(encoded("PNG"), max_pixels=2400).size == (60, 40)


def test_just_over_the_limit_is_our_error_not_pillows_warning():
    with pytest.raises(NvlmError, match="10000 x 10000 pixels, more than the 89,000,000"):
        open_image(png_header(10_000, 10_000))


def test_a_16_bit_grey_picture_is_scaled_not_clipped():
    grey = np.arange(0, 256, dtype=np.uint8).reshape(16, 16)
    encoded = io.BytesIO()
    Image.fromarray(grey.astype(np.uint16) * 257).save(encoded, "PNG")
    assert np.array_equal(np.asarray(open_image(encoded.getvalue()))[..., 0], grey)
