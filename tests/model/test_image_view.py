"""The model sees what a viewer shows: orientation, transparency, and metadata that decides nothing."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, TiffImagePlugin

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.image_file.opening import open_image
from nvlm_deploy.image_file.reading import ImageReading
from nvlm_deploy.model.image_tiler import ImageTiler
from nvlm_deploy.model.spec import TilingSpec
from nvlm_deploy.sample_embeddings import tiles_of_file

pytestmark = pytest.mark.slow

SMALL = TilingSpec(tile_size=56, min_tiles=1, max_tiles=6, use_thumbnail=True, tokens_per_tile=4)
REFERENCE = ImageReading("reference")
RANDOM = np.random.default_rng(0)
COLOURS = RANDOM.integers(0, 256, (40, 60, 3), dtype=np.uint8)
ALPHA = RANDOM.integers(0, 256, (40, 60), dtype=np.uint8)


def saved(image: Image.Image, format_name: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format_name, **options)
    return file.getvalue()


def pixels(encoded: bytes, reading: ImageReading | None = None) -> np.ndarray:
    return np.asarray(open_image(encoded, reading or ImageReading())).astype(int)


def on_background(colours: np.ndarray, alpha: np.ndarray, background: int = 255) -> np.ndarray:
    """The definition of a flattened pixel, rounded."""
    share = alpha[..., None].astype(float) / 255
    return np.floor(colours * share + background * (1 - share) + 0.5).astype(int)


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[0x0112] = orientation
    return block


def png_chunk(name: bytes, content: bytes, *, crc: int | None = None) -> bytes:
    checksum = zlib.crc32(name + content) if crc is None else crc
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)


def with_chunks(png: bytes, *chunks: bytes, last: bool = False) -> bytes:
    """The PNG with chunks behind its header, or before its end."""
    place = len(png) - 12 if last else 33
    return png[:place] + b"".join(chunks) + png[place:]


def raw_png(bits: int, colour_type: int, rows: list[bytes], width: int, *chunks: bytes) -> bytes:
    """A PNG of any bit depth, which Pillow does not write."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, len(rows), bits, colour_type, 0, 0, 0))
    data = png_chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + data + png_chunk(b"IEND", b"")


# --- orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_orientation_is_shown_upright_in_every_format_that_names_one(format_name, orientation):
    options = {"lossless": True} if format_name == "WEBP" else {}
    image = Image.fromarray(COLOURS)
    turned = saved(image, format_name, exif=exif(orientation), **options)
    plain = Image.open(io.BytesIO(saved(image, format_name, **options)))
    expected = np.asarray(ImageOps.exif_transpose(_marked(plain, orientation)).convert("RGB"))
    assert np.array_equal(pixels(turned), expected)
    assert np.array_equal(pixels(turned, REFERENCE), np.asarray(plain.convert("RGB")))


def _marked(image: Image.Image, orientation: int) -> Image.Image:
    image.load()
    image.getexif()[0x0112] = orientation
    return image


@pytest.mark.parametrize(("orientation", "columns", "rows"), [(1, 3, 1), (3, 3, 1), (6, 1, 3), (5, 1, 3)])
def test_the_grid_is_chosen_from_the_size_as_viewed(orientation, columns, rows):
    wide = saved(Image.new("RGB", (300, 100)), "JPEG", exif=exif(orientation))
    tiler = ImageTiler(SMALL)
    tiles, counts = tiler.tiles([wide])
    tiler.close()
    upright = saved(Image.new("RGB", (100 * columns, 100 * rows)), "JPEG")
    assert counts == [4]
    other = ImageTiler(SMALL)
    assert np.array_equal(tiles, other.tiles([upright])[0])
    other.close()


def test_turned_pixels_reach_the_tiles():
    image = Image.fromarray(COLOURS)
    tiler = ImageTiler(SMALL)
    turned, _ = tiler.tiles([saved(image, exif=exif(6))])
    upright, _ = tiler.tiles([saved(image.transpose(Image.Transpose.ROTATE_270))])
    tiler.close()
    assert np.array_equal(turned, upright)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_is_none_is_ignored(orientation):
    image = Image.fromarray(COLOURS)
    assert np.array_equal(pixels(saved(image, exif=exif(orientation))), COLOURS)


@pytest.mark.parametrize("order", ["<", ">"])
def test_an_orientation_of_a_big_or_little_endian_block_is_read(order):
    block = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, 1)
    block += struct.pack(f"{order}HHIHH", 0x0112, 3, 1, 6, 0)
    png = with_chunks(saved(Image.fromarray(COLOURS)), png_chunk(b"eXIf", block))
    assert np.array_equal(pixels(png), np.rot90(COLOURS, 3))


@settings(max_examples=200, deadline=None)
@given(noise=st.binary(max_size=80), keep=st.integers(0, 26))
def test_no_exif_block_keeps_a_picture_from_being_read(noise, keep):
    sound = exif(6).tobytes()[6:]
    for block in (noise, sound[:keep] + noise, b"II*\0" + noise, b"MM\0*" + noise):
        png = with_chunks(saved(Image.fromarray(COLOURS)), png_chunk(b"eXIf", block))
        assert sorted(pixels(png).shape) == [3, 40, 60]


# --- transparency


@pytest.mark.parametrize("format_name", ["PNG", "WEBP", "TIFF"])
def test_rgba_lies_on_white(format_name):
    image = Image.fromarray(np.dstack([COLOURS, ALPHA]))
    options = {"lossless": True, "exact": True} if format_name == "WEBP" else {}
    found = pixels(saved(image, format_name, **options))
    assert np.abs(found - on_background(COLOURS, ALPHA)).max() <= 1
    assert np.array_equal(found[ALPHA == 0], np.full((int((ALPHA == 0).sum()), 3), 255))


def test_an_opaque_pixel_keeps_its_value_beside_transparent_ones():
    alpha = np.where(ALPHA < 100, 0, 255).astype(np.uint8)
    found = pixels(saved(Image.fromarray(np.dstack([COLOURS, alpha]))))
    assert np.array_equal(found, np.where(alpha[..., None] == 255, COLOURS, 255))


@pytest.mark.parametrize("background", ["black", "#336699", "rebeccapurple"])
def test_the_background_is_a_choice(background):
    clear = saved(Image.new("RGBA", (5, 4), (1, 2, 3, 0)))
    found = open_image(clear, ImageReading(background=background))
    assert found.getpixel((2, 2)) == Image.new("RGB", (1, 1), background).getpixel((0, 0))


@pytest.mark.parametrize("background", ["whit", "#12", "#11223344", ""])
def test_a_background_that_is_no_opaque_colour_is_refused(background):
    with pytest.raises(NvlmError, match="no opaque colour"):
        ImageReading(background=background)


def test_grey_with_alpha_lies_on_white():
    grey = COLOURS[..., 0]
    found = pixels(saved(Image.merge("LA", (Image.fromarray(grey), Image.fromarray(ALPHA)))))
    assert np.abs(found - on_background(np.dstack([grey] * 3), ALPHA)).max() <= 1


def palette_image() -> Image.Image:
    return Image.fromarray(COLOURS).quantize(16)


def test_a_palette_with_alpha_by_index_lies_on_white():
    image = palette_image()
    alphas = bytes(RANDOM.integers(0, 256, 16, dtype=np.uint8))
    found = pixels(saved(image, transparency=alphas))
    alpha = np.frombuffer(alphas, np.uint8)[np.asarray(image)]
    assert np.abs(found - on_background(np.asarray(image.convert("RGB")), alpha)).max() <= 1


@pytest.mark.parametrize("format_name", ["PNG", "GIF"])
def test_one_transparent_index_of_a_palette_is_white(format_name):
    image = palette_image()
    colours = np.asarray(image.convert("RGB"))
    found = pixels(saved(image, format_name, transparency=5))
    clear = np.asarray(image) == 5
    assert clear.any()
    assert np.array_equal(found, np.where(clear[..., None], 255, colours))


def test_the_transparent_colour_of_rgb_is_white_and_its_neighbours_are_not():
    colours = COLOURS.copy()
    colours[3:9, 5:20] = (10, 20, 30)
    colours[0, 0] = (10, 20, 31)
    found = pixels(saved(Image.fromarray(colours), transparency=(10, 20, 30)))
    expected = colours.copy()
    expected[3:9, 5:20] = 255
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_transparent_grey_of_any_bit_depth_is_white(bits):
    most = (1 << bits) - 1
    values, key = np.arange(16) % (most + 1), 1 if bits > 1 else 0
    row = np.packbits((values[:, None] >> np.arange(bits)[::-1] & 1).astype(np.uint8).ravel()).tobytes()
    found = pixels(raw_png(bits, 0, [row] * 3, 16, png_chunk(b"tRNS", struct.pack(">H", key))))
    expected = np.where(values == key, 255, values * 255 // most)
    assert np.array_equal(found, np.broadcast_to(expected[None, :, None], (3, 16, 3)))


def test_the_transparent_grey_of_16_bits_is_compared_in_all_its_bits():
    values = np.array([0x1234, 0x1235, 0x1334, 0xFFFF, 0], ">u2")
    found = pixels(raw_png(16, 0, [values.tobytes()], 5, png_chunk(b"tRNS", struct.pack(">H", 0x1234))))
    assert found[0, :, 0].tolist() == [255, 0x12, 0x13, 0xFF, 0]


def test_the_transparent_colour_of_16_bit_rgb_is_compared_in_all_its_bits():
    values = np.array([[0x1234, 0x5678, 0x9ABC], [0x1234, 0x5678, 0x9ABD], [0x1235, 0x5678, 0x9ABC]], ">u2")
    key = png_chunk(b"tRNS", struct.pack(">HHH", 0x1234, 0x5678, 0x9ABC))
    found = pixels(raw_png(16, 2, [values.tobytes()], 3, key))
    assert found[0].tolist() == [[255] * 3, [0x12, 0x56, 0x9A], [0x12, 0x56, 0x9A]]


def test_premultiplied_alpha_of_a_tiff_lies_on_white():
    premultiplied = (COLOURS * (ALPHA[..., None] / 255)).astype(np.uint8)
    tiff = saved(Image.fromarray(np.dstack([premultiplied, ALPHA])), "TIFF")
    unassociated, associated = (struct.pack("<HHIHH", 338, 3, 1, kind, 0) for kind in (2, 1))
    assert tiff.count(unassociated) == 1
    tiff = tiff.replace(unassociated, associated)
    visible = ALPHA > 40  # what is all but transparent has few bits of colour left
    assert np.abs(pixels(tiff) - on_background(COLOURS, ALPHA))[visible].max() <= 8


def test_a_gif_whose_first_frame_is_smaller_than_its_screen_has_white_around_it():
    inner = Image.new("P", (10, 8), 1)
    inner.putpalette([0, 0, 0, 200, 30, 40] + [0] * 750)
    gif = bytearray(saved(inner, "GIF"))
    gif[6:10] = struct.pack("<HH", 30, 20)
    start = gif.index(b",\0\0\0\0\x0a\0\x08\0")
    gif[start + 1 : start + 5] = struct.pack("<HH", 5, 6)
    found = pixels(bytes(gif))
    expected = np.full((20, 30, 3), 255)
    expected[6:14, 5:15] = (200, 30, 40)
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("format_name", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation_is_shown(format_name):
    frames = [Image.new("RGB", (30, 20), colour) for colour in ("red", "green", "blue")]
    options = {"lossless": True} if format_name == "WEBP" else {}
    found = pixels(saved(frames[0], format_name, save_all=True, append_images=frames[1:], **options))
    assert np.array_equal(found, np.broadcast_to([255, 0, 0], (20, 30, 3)))


def test_calibration_and_the_server_see_the_same_pixels(tmp_path):
    turned = saved(Image.fromarray(np.dstack([COLOURS, ALPHA])), exif=exif(6))
    (tmp_path / "turned.png").write_bytes(turned)
    for reading in (ImageReading(), ImageReading(background="black"), REFERENCE):
        tiler = ImageTiler(SMALL, reading=reading)
        assert np.array_equal(tiles_of_file(tmp_path / "turned.png", SMALL, reading), tiler.tiles([turned])[0])
        tiler.close()


def test_the_hidden_digits_of_an_alpha_plane_are_seen():
    """Black ink in alpha alone: all black for the reference, black on white for a viewer."""
    ink = saved(Image.fromarray(np.dstack([np.zeros_like(COLOURS), 255 - COLOURS[..., 0]])))
    assert np.abs(pixels(ink) - COLOURS[..., :1]).max() <= 1
    assert pixels(ink, REFERENCE).max() == 0


# --- opaque, upright pictures are what they were in both views


@pytest.mark.parametrize(
    ("format_name", "mode"),
    [
        *(("PNG", mode) for mode in ("RGB", "L", "P", "1")),
        *(("JPEG", mode) for mode in ("RGB", "L", "CMYK")),
        *(("TIFF", mode) for mode in ("RGB", "L", "P", "1", "CMYK")),
        *(("BMP", mode) for mode in ("RGB", "L", "P", "1")),
        *(("GIF", mode) for mode in ("L", "P")),
        ("WEBP", "RGB"),
    ],
)
@pytest.mark.parametrize("view", ["as_viewed", "reference"])
def test_opaque_upright_pictures_are_pillows_own_conversion(format_name, mode, view):
    encoded = saved(Image.fromarray(COLOURS).convert(mode), format_name)
    own = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
    assert np.array_equal(pixels(encoded, ImageReading(view)), own)


@pytest.mark.parametrize("format_name", ["PNG", "TIFF"])
@pytest.mark.parametrize("view", ["as_viewed", "reference"])
def test_16_bit_grey_is_scaled(format_name, view):
    grey = (COLOURS[..., 0].astype(np.uint16) << 8) + 77
    found = pixels(saved(Image.fromarray(grey), format_name), ImageReading(view))
    assert np.array_equal(found, np.dstack([COLOURS[..., 0]] * 3))


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1"])
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_every_safe_compression_of_tiff_is_read(mode, compression):
    image = Image.fromarray(COLOURS).convert(mode)
    found = pixels(saved(image, "TIFF", compression=compression))
    assert np.array_equal(found, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(("compression", "mode", "name"), [("jpeg", "RGB", "JPEG"), ("group4", "1", "CCITT G4")])
def test_other_compressions_of_tiff_are_refused_by_their_name(compression, mode, name):
    with pytest.raises(NvlmError, match=f"TIFF file with {name} compression"):
        open_image(saved(Image.fromarray(COLOURS).convert(mode), "TIFF", compression=compression))


@pytest.mark.parametrize("options", [{"progressive": True}, {"subsampling": 0}, {"optimize": True}, {"quality": 20}])
def test_every_kind_of_jpeg_is_libjpegs_own_pixels(options):
    encoded = saved(Image.fromarray(COLOURS), "JPEG", **options)
    assert np.array_equal(pixels(encoded), np.asarray(Image.open(io.BytesIO(encoded))))


# --- metadata decides nothing


def jpeg_segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def broken_png_chunks() -> dict[str, bytes]:
    text = b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(b"x" * 20_000_000)
    return {
        "an oversized iTXt": png_chunk(*text),
        "an oversized zTXt": png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"y" * 20_000_000)),
        "a zTXt that is not zlib": png_chunk(b"zTXt", b"Comment\0\0nonsense"),
        "a zTXt of another method": png_chunk(b"zTXt", b"Comment\0\x07nonsense"),
        "an iCCP that is not zlib": png_chunk(b"iCCP", b"profile\0\0nonsense"),
        "an oversized iCCP": png_chunk(b"iCCP", b"profile\0\0" + zlib.compress(b"z" * 20_000_000)),
        "an empty iCCP": png_chunk(b"iCCP", b""),
        "a text with a bad checksum": png_chunk(b"tEXt", b"a\0b", crc=1),
        "a short gAMA": png_chunk(b"gAMA", b"\0"),
        "a short pHYs": png_chunk(b"pHYs", b"\0\0"),
        "an absurd pHYs": png_chunk(b"pHYs", b"\xff" * 8 + b"\1"),
        "a short cHRM": png_chunk(b"cHRM", b"\0" * 3),
        "a broken sRGB": png_chunk(b"sRGB", b""),
        "XMP garbage": png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0\xff\xfe<garbage"),
        "a broken acTL": png_chunk(b"acTL", b"\0"),
        "an animation without frames": png_chunk(b"acTL", struct.pack(">II", 7, 0)),
        "a broken fcTL": png_chunk(b"fcTL", b"\0" * 3),
        "EXIF garbage": png_chunk(b"eXIf", b"II*\0garbage"),
        "a tRNS of another length": png_chunk(b"tRNS", b"\0"),
        "a tRNS with a bad checksum": png_chunk(b"tRNS", struct.pack(">HHH", 1, 2, 3), crc=5),
        "an unknown chunk": png_chunk(b"abCd", b"x" * 100),
    }


@pytest.mark.parametrize("last", [False, True], ids=["before", "behind"])
@pytest.mark.parametrize("name", broken_png_chunks())
def test_a_broken_ancillary_chunk_of_a_png_decides_nothing(name, last):
    broken = broken_png_chunks()[name]
    turn = png_chunk(b"eXIf", exif(6).tobytes()[6:])
    image = Image.fromarray(COLOURS)
    assert np.array_equal(pixels(with_chunks(saved(image), broken, last=last)), COLOURS)
    if name != "EXIF garbage":
        assert np.array_equal(pixels(with_chunks(saved(image), turn, broken, last=last)), np.rot90(COLOURS, 3))


@pytest.mark.parametrize("checksum", [None, 7])
def test_an_orientation_is_read_behind_the_pixels_and_with_a_bad_checksum(checksum):
    turn = png_chunk(b"eXIf", exif(6).tobytes()[6:], crc=checksum)
    assert np.array_equal(pixels(with_chunks(saved(Image.fromarray(COLOURS)), turn, last=True)), np.rot90(COLOURS, 3))


BROKEN_SEGMENTS = {
    "EXIF garbage": jpeg_segment(0xE1, b"Exif\0\0II*\0garbage"),
    "an EXIF block that ends at once": jpeg_segment(0xE1, b"Exif\0\0"),
    "XMP garbage": jpeg_segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta \xff\xfe"),
    "an MPO index that is none": jpeg_segment(0xE2, b"MPF\0II*\0\xff\xff\xff\xff"),
    "an MPO index without pictures": jpeg_segment(0xE2, b"MPF\0MM\0*\0\0\0\x08\0\0"),
    "an ICC profile of one part of many": jpeg_segment(0xE2, b"ICC_PROFILE\0\x05\x09garbage"),
    "a short ICC profile": jpeg_segment(0xE2, b"ICC_PROFILE\0"),
    "broken Photoshop blocks": jpeg_segment(0xED, b"Photoshop 3.0\x008BIM\x04\x04\xff\xff"),
    "an absurd density": jpeg_segment(0xE0, b"JFIF\0\1\1\1\0\0\0\0\0\0"),
    "a short JFIF": jpeg_segment(0xE0, b"JFIF\0"),
    "a short Adobe marker": jpeg_segment(0xEE, b"Adob"),
    "a comment": jpeg_segment(0xFE, b"\xff\xfe"),
    "FlashPix garbage": jpeg_segment(0xE2, b"FPXR\0"),
    "fill bytes": b"\xff" * 50,
    "a restart and a TEM": b"\xff\xd0\xff\x01",
    "bytes between segments": jpeg_segment(0xFE, b"") + b"\0\1\2\3",
}


@pytest.mark.parametrize("name", BROKEN_SEGMENTS)
def test_a_broken_app_segment_of_a_jpeg_decides_nothing(name):
    whole = saved(Image.fromarray(COLOURS), "JPEG", quality=90)
    turn = jpeg_segment(0xE1, b"Exif\0\0" + exif(6).tobytes()[6:])
    broken = BROKEN_SEGMENTS[name]
    expected = np.asarray(Image.open(io.BytesIO(whole)))
    assert np.array_equal(pixels(whole[:2] + broken + whole[2:]), expected)
    assert np.array_equal(pixels(whole[:2] + broken + turn + whole[2:]), np.rot90(expected, 3))
    assert np.array_equal(pixels(whole[:2] + turn + broken + whole[2:]), np.rot90(expected, 3))


@pytest.mark.parametrize("tail", [b"garbage", b"\xff\xd8\xff\xe0second picture", b"\0" * 1000])
@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_what_follows_the_picture_decides_nothing(format_name, tail):
    whole = saved(Image.fromarray(COLOURS), format_name)
    assert np.array_equal(pixels(whole + tail), pixels(whole))


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"".join(
        name + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2) for name, content in chunks
    )
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def test_a_webp_whose_first_frame_is_smaller_than_its_canvas_has_white_around_it():
    frame = saved(Image.new("RGB", (10, 8), (200, 30, 40)), "WEBP", lossless=True)[12:]
    header = b"\x02\0\0\0" + (29).to_bytes(3, "little") + (19).to_bytes(3, "little")
    place = b"".join(number.to_bytes(3, "little") for number in (2, 3, 9, 7, 100)) + b"\0"
    animation = riff((b"VP8X", header), (b"ANIM", b"\0" * 6), (b"ANMF", place + frame), (b"ANMF", place + frame))
    expected = np.full((20, 30, 3), 255)
    expected[6:14, 4:14] = (200, 30, 40)
    assert np.array_equal(pixels(animation), expected)


@pytest.mark.parametrize("name", [b"EXIF", b"XMP ", b"ICCP", b"abcd"])
def test_broken_metadata_of_a_webp_decides_nothing(name):
    plain = saved(Image.fromarray(COLOURS), "WEBP", lossless=True)
    header = bytes([0xFF & ~0x12]) + b"\0\0\0" + (59).to_bytes(3, "little") + (39).to_bytes(3, "little")
    picture = plain[12:16], plain[20 : 20 + int.from_bytes(plain[16:20], "little")]
    for chunks in ([(name, b"garbage"), picture], [picture, (name, b"garbage")]):
        assert np.array_equal(pixels(riff((b"VP8X", header), *chunks)), COLOURS)


def test_absurd_resolutions_of_tiff_and_bmp_decide_nothing():
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info[282], info[283] = TiffImagePlugin.IFDRational(1, 0), TiffImagePlugin.IFDRational(0, 1)
    assert np.array_equal(pixels(saved(Image.fromarray(COLOURS), "TIFF", tiffinfo=info)), COLOURS)
    bmp = bytearray(saved(Image.fromarray(COLOURS), "BMP"))
    bmp[38:46] = b"\xff" * 8
    assert np.array_equal(pixels(bytes(bmp)), COLOURS)


DAMAGES: list[Callable[[bytes, int, int], bytes]] = [
    lambda whole, place, value: whole[:place] + bytes([value]) + whole[place + 1 :],
    lambda whole, place, _: whole[:place],
    lambda whole, place, value: whole[:place] + bytes([value]) * 4 + whole[place:],
]


@settings(max_examples=400, deadline=None)
@given(
    format_name=st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]),
    mode=st.sampled_from(["RGB", "L", "P", "RGBA"]),
    share=st.floats(0, 1),
    value=st.integers(0, 255),
    damage=st.sampled_from(DAMAGES),
)
def test_no_damage_escapes_as_another_exception(format_name, mode, share, value, damage):
    image = Image.fromarray(COLOURS).convert("RGB" if format_name == "JPEG" and mode in ("P", "RGBA") else mode)
    whole = saved(image, format_name, **({"exif": exif(6)} if format_name in ("JPEG", "PNG", "WEBP", "TIFF") else {}))
    try:
        open_image(damage(whole, int(share * (min(len(whole), 400) - 1)), value))
    except NvlmError as problem:
        assert "image" in problem.message or "file" in problem.message
