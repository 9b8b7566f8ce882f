"""An image may come as raw bytes, as base64 or as a data URL."""

from __future__ import annotations

import base64
import io
import textwrap

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.image_file.limits import ImageLimits
from nvlm_deploy.image_file.reading import ImageReading
from nvlm_deploy.image_file.text import file_of
from nvlm_deploy.model.image_tiler import ImageTiler
from nvlm_deploy.model.spec import TilingSpec

SMALL = TilingSpec(tile_size=56, min_tiles=1, max_tiles=6, use_thumbnail=True, tokens_per_tile=4)
FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]
LIMITS = ImageLimits()


def saved(format_name: str, size: tuple[int, int] = (60, 40)) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, format_name)
    return file.getvalue()


PNG = saved("PNG")
TEXT = base64.b64encode(PNG)
FORMS = {
    "standard": TEXT,
    "without padding": TEXT.rstrip(b"="),
    "URL-safe": base64.urlsafe_b64encode(PNG),
    "URL-safe without padding": base64.urlsafe_b64encode(PNG).rstrip(b"="),
    "in lines": base64.encodebytes(PNG),
    "in lines of MIME": b"\r\n".join(textwrap.wrap(TEXT.decode(), 76)[i].encode() for i in range(len(TEXT) // 76))
    + b"\r\n"
    + TEXT[len(TEXT) // 76 * 76 :],
    "with space around it": b"\n\t  " + TEXT + b" \n",
    "a data URL": b"data:image/png;base64," + TEXT,
    "a data URL of another type": b"data:image/jpeg;base64," + TEXT,
    "a data URL with parameters": b"data:image/png;charset=utf-8;name=a.png;base64," + TEXT,
    "a data URL without a type": b"data:;base64," + TEXT,
    "a data URL in capitals": b"DATA:IMAGE/PNG;BASE64," + TEXT,
    "a data URL with spaces": b" data:image/png; base64, " + TEXT,
    "a data URL with escapes": b"data:image/png;base64,"
    + TEXT.replace(b"+", b"%2B").replace(b"/", b"%2f").replace(b"=", b"%3D"),
    "raw": PNG,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_file_is_the_same_file(form):
    assert file_of(FORMS[form], LIMITS) == PNG


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize(
    "encode", [bytes, base64.b64encode, base64.urlsafe_b64encode], ids=["raw", "base64", "URL-safe"]
)
def test_every_format_is_read_as_text(format_name, encode):
    tiler = ImageTiler(SMALL)
    file = saved(format_name)
    assert np.array_equal(tiler.tiles([encode(file)])[0], tiler.tiles([file])[0])
    tiler.close()


@settings(max_examples=100, deadline=None)
@given(
    content=st.binary(min_size=6, max_size=100),
    spaces=st.lists(st.tuples(st.integers(0, 150), st.sampled_from([b" ", b"\n", b"\r\n", b"\t"])), max_size=5),
    safe=st.booleans(),
    padded=st.booleans(),
)
def test_base64_of_any_bytes_is_those_bytes(content, spaces, safe, padded):
    text = (base64.urlsafe_b64encode if safe else base64.b64encode)(content)
    text = text if padded else text.rstrip(b"=")
    for place, space in spaces:
        text = text[:place] + space + text[place:]
    assert file_of(b"data:image/png;base64," + text, LIMITS) == content


def test_raw_bytes_win_over_text_that_they_might_be():
    bmp = saved("BMP")
    assert file_of(bmp, LIMITS) is bmp


@pytest.mark.parametrize(
    ("element", "words"),
    [
        (b"https://example.com/cat.png", "image is a https:// URL; nothing is fetched"),
        (b"  HTTP://example.com/cat.png", "image is a http:// URL; nothing is fetched"),
        (b"file:///etc/passwd", "image is a file:// URL; nothing is fetched"),
        (b"s3://bucket/cat.png", "image is a s3:// URL; nothing is fetched"),
        (b"data:image/svg+xml,%3Csvg%3E", "data URL that is not in base64"),
        (b"data:image/png," + TEXT, "data URL that is not in base64"),
        (b"data:image/png;base64" + TEXT, "data URL without a comma"),
        (TEXT[:40] + b"!" + TEXT[40:], r"broken base64: '!' at position 41 is not of its alphabet"),
        (TEXT[:40] + "é".encode() + TEXT[40:], r"broken base64: .* at position 41"),
        (b"data:image/png;base64,iVBO*", r"broken base64: '\*' at position 5"),
        (TEXT[:40] + b"=" + TEXT[40:], "broken base64: '=' at position 41 is not at its end"),
        (TEXT[:41], "broken base64: 41 characters"),
        (b"not a picture", "not an image: "),
        (b"hello hello, I am text", "not an image: 22 bytes of no known format, nor base64: ',' at position 12"),
        (b"data:image/png;base64,", r"the image is empty \(0 bytes\)"),
        (b"", r"the image is empty \(0 bytes\)"),
        (b" \n ", "not an image"),
        (TEXT[:100], "damaged or truncated"),
        (base64.b64encode(b"hello, I am a text file"), "not an image: 23 bytes"),
        (base64.b64encode(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"), "a HEIC file"),
        (base64.b64encode(b"%PDF-1.7\n%more of it"), "a PDF file"),
    ],
)
def test_what_is_no_image_is_said_with_its_number(element, words):
    tiler = ImageTiler(SMALL)
    with pytest.raises(NvlmError, match=f"image 2 of 2: .*{words}"):
        tiler.tiles([PNG, element])
    tiler.close()


@pytest.mark.parametrize("form", FORMS)
def test_the_limit_is_on_the_decoded_bytes(form):
    fits, small = (ImageReading(limits=ImageLimits(max_image_bytes=size)).limits for size in (len(PNG), len(PNG) - 1))
    assert file_of(FORMS[form], fits) == PNG
    with pytest.raises(NvlmError, match=f"the image has {len(PNG):,} bytes, the limit is {len(PNG) - 1:,}"):
        file_of(FORMS[form], small)
