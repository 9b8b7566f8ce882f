"""Which bytes are an image, and what is said of those that are not."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.image_file.limits import ImageLimits
from nvlm_deploy.image_file.opening import open_image
from nvlm_deploy.image_file.reading import ImageReading
from nvlm_deploy.model.spec import TilingSpec
from nvlm_deploy.model.tiling import tiles_from_image

FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]
REFERENCE = ImageReading("reference")
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


@pytest.mark.parametrize("format_name", FORMATS)
def test_every_format_opens_as_rgb(format_name):
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
    assert np.array_equal(np.asarray(open_image(file, REFERENCE)), np.asarray(own))


def test_exif_rotation_is_not_applied_in_the_view_of_the_reference():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to display
    turned = open_image(encoded("JPEG", exif=exif, quality=95), REFERENCE)
    assert turned.size == (60, 40)
    assert np.array_equal(
        tiles_from_image(turned, TILING), tiles_from_image(open_image(encoded("JPEG", quality=95)), TILING)
    )


def test_no_bytes_are_an_empty_image():
    with pytest.raises(NvlmError, match="empty"):
        open_image(b"")


@pytest.mark.parametrize("text", [b"hello, I am a text file", b"\0" * 1000, b"BMW is a car", b"RIFF", b"\xff\xd8"])
def test_what_is_no_image_is_refused_with_the_formats_that_are_read(text):
    with pytest.raises(NvlmError, match=f"not an image: {len(text):,} bytes .*JPEG, PNG, WebP, GIF, BMP and TIFF"):
        open_image(text)


OTHERS = {
    "a HEIC file": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "an AVIF file": b"\0\0\0\x20ftypavif\0\0\0\0avifmif1",
    "an SVG file": b"<?xml version='1.0'?>\n<!-- made by hand -->\n<svg xmlns='http://www.w3.org/2000/svg'/>",
    "a PDF file": b"%PDF-1.7\n",
    "an ICO file": b"\0\0\1\0\1\0\x10\x10\0\0\1\0",
    "a JPEG 2000 file": b"\0\0\0\x0cjP  \r\n\x87\n",
    "a JPEG XL file": b"\xff\x0a\xfa\x1f",
    "a PSD file": b"8BPS\0\1\0\0\0\0\0\0\0\3",
    "a BigTIFF file": b"II\x2b\0\x08\0\0\0",
    "a camera's raw file": b"II\x2a\0\x10\0\0\0CR\2\0",
    "a PNM file": b"P6\n1 1\n255\n\0\0\0",
    "an MP4 video": b"\0\0\0\x18ftypmp42\0\0\0\0",
    "an HTML page": b"\n<!DOCTYPE html><html>",
    "a ZIP archive": b"PK\3\4\x14\0",
    "a gzip archive": b"\x1f\x8b\x08\0",
    "an OpenEXR file": b"v/1\1\2\0\0\0",
    "a DDS file": b"DDS \x7c\0\0\0",
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_known_format_that_is_not_read_is_refused_by_its_name(name):
    with pytest.raises(NvlmError, match=f"^{name}.*; JPEG, PNG, WebP, GIF, BMP and TIFF are read"):
        open_image(OTHERS[name])


@pytest.mark.parametrize(("format_name", "name"), [("AVIF", "an AVIF file"), ("JPEG2000", "a JPEG 2000 file")])
def test_real_files_of_formats_that_pillow_could_read_are_refused_too(format_name, name):
    with pytest.raises(NvlmError, match=name):
        open_image(encoded(format_name))


@pytest.mark.parametrize("format_name", FORMATS)
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
    with pytest.raises(NvlmError, match=r"20000 x 20000 pixels \(400,000,000\), the limit is 89,000,000"):
        open_image(png_header(20_000, 20_000))


def test_more_pixels_than_allowed_are_refused_with_both_numbers():
    with pytest.raises(NvlmError, match=r"60 x 40 pixels \(2,400\), the limit is 2,399"):
        open_image(encoded("PNG"), ImageReading(limits=ImageLimits(max_image_pixels=2399)))
    assert open_image(encoded("PNG"), ImageReading(limits=ImageLimits(max_image_pixels=2400))).size == (60, 40)


def test_a_16_bit_grey_picture_is_scaled_not_clipped():
    grey = np.arange(0, 256, dtype=np.uint8).reshape(16, 16)
    encoded = io.BytesIO()
    Image.fromarray(grey.astype(np.uint16) * 257).save(encoded, "PNG")
    assert np.array_equal(np.asarray(open_image(encoded.getvalue()))[..., 0], grey)
