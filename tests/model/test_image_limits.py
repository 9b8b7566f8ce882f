"""What an image may cost: judged from its header, whatever its bytes are, and given back afterwards."""

from __future__ import annotations

import contextlib
import io
import struct
import subprocess
import sys
import time
import tracemalloc
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.image_file.limits import MEBIBYTE, ImageLimits
from nvlm_deploy.image_file.opening import judged_size, open_image, structure_of
from nvlm_deploy.image_file.reading import ImageReading
from nvlm_deploy.model.image_tiler import ImageTiler
from nvlm_deploy.model.spec import TilingSpec

pytestmark = pytest.mark.slow

SMALL = TilingSpec(tile_size=56, min_tiles=1, max_tiles=6, use_thumbnail=True, tokens_per_tile=4)
LIMITS = ImageLimits()
FULL = 31 * MEBIBYTE


def saved(size: tuple[int, int], format_name: str, **options: object) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "white").save(file, format_name, **options)
    return file.getvalue()


def png_chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks)


def vp8x(width: int, height: int, flags: int = 0) -> bytes:
    content = bytes([flags, 0, 0, 0]) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF\xff\xff\xff\x7fWEBPVP8X" + struct.pack("<I", 10) + content


def tiff(*tags: tuple[int, int, int, int], data: bytes = b"") -> bytes:
    """A little-endian TIFF of tags (number, type, count, value or offset)."""
    entries = b"".join(struct.pack("<HHII", *tag) for tag in sorted(tags))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + b"\0\0\0\0" + data


def seconds(work: Callable[[], object]) -> float:
    """The least processor time of three, of work that may raise NvlmError."""
    times = []
    for _ in range(3):
        start = time.process_time()
        with contextlib.suppress(NvlmError):
            work()
        times.append(time.process_time() - start)
    return min(times)


HUGE = {
    "PNG": png(30_000, 30_000),
    "JPEG": b"\xff\xd8\xff\xc0" + struct.pack(">HBHHB", 17, 8, 30_000, 30_000, 3) + b"\1\x22\0\2\x11\1\3\x11\1",
    "WebP, lossless": b"RIFF\xff\xff\0\0WEBPVP8L\xff\xff\0\0\x2f" + struct.pack("<I", 16382 | 16382 << 14) + b"\0" * 9,
    "WebP, lossy": b"RIFF\xff\xff\0\0WEBPVP8 \xff\xff\0\0\0\0\0\x9d\x01\x2a"
    + struct.pack("<HH", 16383, 16383)
    + b"\0" * 9,
    "WebP, extended": vp8x(30_000, 30_000),
    "GIF": b"GIF89a" + struct.pack("<HHBBB", 30_000, 30_000, 0, 0, 0) + b",\0\0\0\0\1\0\1\0\0\2",
    "GIF, by its frame": b"GIF89a\1\0\1\0\0\0\0," + struct.pack("<HHHHB", 0, 0, 30_000, 30_000, 0) + b"\2",
    "BMP": b"BM" + b"\0" * 12 + struct.pack("<IiiHHI", 40, 30_000, 30_000, 1, 24, 0) + b"\0" * 24,
    "BMP, top down": b"BM" + b"\0" * 12 + struct.pack("<IiiHHI", 40, 30_000, -30_000, 1, 24, 0) + b"\0" * 24,
    "TIFF": tiff((256, 4, 1, 30_000), (257, 4, 1, 30_000)),
}


@pytest.mark.parametrize("name", HUGE)
def test_a_huge_picture_is_refused_from_its_header_in_well_under_a_millisecond(name):
    with pytest.raises(NvlmError, match=r"\d+ x \d+ pixels \([0-9,]{11}\), the limit is 89,000,000"):
        judged_size(HUGE[name], LIMITS)
    assert seconds(lambda: judged_size(HUGE[name], LIMITS)) < 0.001


@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_the_judged_size_is_pillows(format_name):
    for size in [(1, 1), (7, 3), (300, 2), (129, 257)]:
        assert judged_size(saved(size, format_name), LIMITS) == size


def test_the_pixels_of_a_request_are_judged_together_before_any_is_decoded():
    damaged = saved((300, 300), "PNG")[:200]
    tiler = ImageTiler(SMALL, reading=ImageReading(limits=ImageLimits(max_request_pixels=100_000)))
    with pytest.raises(NvlmError, match=r"the request's 2 images have 180,000 pixels together, the limit is 100,000"):
        tiler.tiles([damaged, saved((300, 300), "WEBP")])
    tiler.close()


def test_sixteen_small_files_of_88_megapixels_are_refused_at_once():
    flat = saved((9400, 9400), "WEBP", method=0)
    assert len(flat) < 10_000_000
    tiler = ImageTiler(SMALL)
    with pytest.raises(NvlmError, match="16 images have 1,413,760,000 pixels together"):
        tiler.tiles([flat] * 16)
    assert seconds(lambda: tiler.tiles([flat] * 16)) < 0.05
    tiler.close()


@pytest.mark.parametrize("start", [b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"", b"/9j/", b"data:image/png;base64,iVBO"])
def test_more_bytes_than_are_read_are_refused_with_both_numbers(start):
    tiler = ImageTiler(SMALL, reading=ImageReading(limits=ImageLimits(max_image_bytes=1000)))
    with pytest.raises(NvlmError, match=r"image 1 of 1: the image has [0-9,]+ bytes, the limit is 1,000"):
        tiler.tiles([start + b"A" * 100_000])
    tiler.close()


def segments(content: bytes, count: int) -> bytes:
    return (b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content) * count


BOMBS = {
    "zeros": b"\0" * FULL,
    "a JPEG of zeros": b"\xff\xd8\xff" + b"\0" * FULL,
    "a JPEG of fill bytes": b"\xff\xd8" + b"\xff" * FULL,
    "a JPEG of restarts": b"\xff\xd8" + b"\xff\xd0" * (FULL // 2),
    "a JPEG of markers and zeros": b"\xff\xd8" + (b"\xff\xd0" + b"\0" * 60_000) * (FULL // 60_002),
    "a JPEG of empty segments": b"\xff\xd8" + segments(b"", FULL // 4),
    "a JPEG of large segments": b"\xff\xd8" + segments(b"Exif\0\0" + b"\0" * 65_000, FULL // 65_010),
    "a PNG of empty chunks": png(9, 9, png_chunk(b"tEXt", b"") * (FULL // 12)),
    "a PNG of one large chunk": png(9, 9, png_chunk(b"tEXt", b"\0" * FULL)),
    "a PNG of empty data": png(9, 9, png_chunk(b"IDAT", b"") * (FULL // 12)),
    "a PNG of large texts": png(9, 9, png_chunk(b"zTXt", b"a\0\0" + zlib.compress(b"\0" * 60_000_000)) * 400),
    "a WebP of empty chunks": vp8x(9, 9) + b"abcd\0\0\0\0" * (FULL // 8),
    "a WebP of frames": vp8x(9, 9, 2) + b"ANMF\0\0\0\0" * (FULL // 8),
    "a GIF of comments": b"GIF89a\1\0\1\0\0\0\0" + b"!\xfe\0" * (FULL // 3),
    "a GIF of one comment": b"GIF89a\1\0\1\0\0\0\0!\xfe" + b"\1a" * (FULL // 2),
    "a GIF of long comments": b"GIF89a\1\0\1\0\0\0\0!\xfe" + (b"\xff" + b"a" * 255) * (FULL // 256),
    "a TIFF of 65,535 tags": tiff(*[(256, 4, 1, 9)] * 65_535),
    "a TIFF of many bits": tiff((256, 4, 1, 9), (257, 4, 1, 9), (258, 3, 8_000_000, 8), data=b"\x08\0" * 8_000_000),
    "a TIFF of many strips": tiff((256, 4, 1, 9), (257, 4, 1, 9), (273, 4, 4_000_000, 8), data=b"\0" * 16_000_000),
    "base64 of zeros": b"A" * FULL,
    "spaces": b" " * FULL,
    "a data URL of escapes": b"data:;base64," + b"%2B" * (FULL // 3),
    "a data URL without a comma": b"data:" + b"a" * FULL,
    "SVG of comments": b"<?xml?>" + b"<!-- -->" * (FULL // 8),
}


@pytest.mark.parametrize("name", BOMBS)
def test_no_bytes_within_the_limit_cost_more_than_a_second(name):
    tiler = ImageTiler(SMALL)
    with pytest.raises(NvlmError, match="image 1 of 1: "):
        tiler.tiles([BOMBS[name]])
    assert seconds(lambda: tiler.tiles([BOMBS[name]])) < 1
    tiler.close()


def test_a_gigabyte_and_a_half_of_zeros_is_refused_at_once():
    zeros = bytes(1_500_000_000)
    tiler = ImageTiler(SMALL)
    assert seconds(lambda: tiler.tiles([zeros])) < 0.001
    with pytest.raises(NvlmError, match="1,500,000,000 bytes, the limit is 33,554,432"):
        tiler.tiles([zeros])
    tiler.close()


def test_large_metadata_before_the_pixels_costs_next_to_nothing():
    picture = saved((60, 40), "JPEG")
    loaded = picture[:2] + segments(b"http://ns.adobe.com/xap/1.0/\0" + b"x" * 65_000, 450) + picture[2:]
    assert np.array_equal(np.asarray(open_image(loaded)), np.asarray(open_image(picture)))
    assert seconds(lambda: open_image(loaded)) < 0.1
    plain = saved((60, 40), "PNG")
    loaded = plain[:33] + png_chunk(b"iTXt", b"\0" * FULL) + plain[33:]
    assert np.array_equal(np.asarray(open_image(loaded)), np.asarray(open_image(plain)))
    assert seconds(lambda: open_image(loaded)) < 0.1


# --- a header that lies


PEAK = """
import contextlib, io, sys
from pathlib import Path
from PIL import Image
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.image_file.opening import open_image

def peak():
    return int(next(line for line in Path("/proc/self/status").open() if line.startswith("VmHWM")).split()[1])

encoded = sys.stdin.buffer.read()
for name in ("JPEG", "PNG", "WEBP", "TIFF"):
    small = io.BytesIO()
    Image.new("RGB", (8, 8)).save(small, name)
    open_image(small.getvalue())
Path("/proc/self/clear_refs").write_text("5")
before = peak()
with contextlib.suppress(NvlmError):
    open_image(encoded)
print(peak() - before)
"""


def two_frames() -> bytes:
    small, large = saved((8, 8), "JPEG"), saved((3000, 3000), "JPEG")
    frame = small.index(b"\xff\xc0")
    end = frame + 2 + int.from_bytes(small[frame + 2 : frame + 4], "big")
    return large[:2] + small[frame:end] + large[2:]


def two_headers() -> bytes:
    large = saved((3000, 3000), "PNG")
    return png(8, 8) + large[8:]


def canvas_of_another_size() -> bytes:
    large = saved((3000, 3000), "WEBP")
    chunk = large[12:]
    return b"RIFF" + struct.pack("<I", 22 + len(chunk)) + b"WEBP" + vp8x(8, 8)[12:] + chunk


def frame_of_another_size() -> bytes:
    """An animation of 8 x 8 pixels whose frame says the same and holds 3000 x 3000."""
    chunk = saved((3000, 3000), "WEBP")[12:]
    frame = b"\0" * 6 + (7).to_bytes(3, "little") * 2 + b"\0" * 4 + chunk
    body = vp8x(8, 8, 2)[8:] + b"ANIM" + struct.pack("<I", 6) + b"\0" * 6
    body += b"ANMF" + struct.pack("<I", len(frame)) + frame
    return b"RIFF" + struct.pack("<I", len(body)) + body


def tiles_of_another_size() -> bytes:
    tags = [(256, 4, 1, 8), (257, 4, 1, 8), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1)]
    return tiff(*tags, (322, 4, 1, 65_536), (323, 4, 1, 65_536), (324, 4, 1, 8), (325, 4, 1, 100), data=b"\0" * 100)


def strips_of_another_size() -> bytes:
    tags = [(256, 4, 1, 60_000), (257, 4, 1, 1), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 65_535)]
    return tiff(*tags, (278, 4, 1, 2**32 - 1), (273, 4, 1, 8), (279, 4, 1, 100), data=b"\0" * 100)


@pytest.mark.parametrize(
    "lie",
    [
        two_frames,
        two_headers,
        canvas_of_another_size,
        frame_of_another_size,
        tiles_of_another_size,
        strips_of_another_size,
    ],
    ids=lambda lie: lie.__name__,
)
def test_a_header_that_lies_about_the_size_gets_nothing_larger_decoded(lie):
    """Measured after a small picture of every format, so that only the picture itself counts."""
    encoded = lie()
    judged_size(encoded, ImageLimits(max_image_pixels=60_000))
    done = subprocess.run([sys.executable, "-c", PEAK], input=encoded, capture_output=True, timeout=60, check=True)
    assert int(done.stdout) < 12_000, "KiB: 3000 x 3000 pixels would be 36,000"


def test_the_memory_of_a_large_picture_would_be_seen():
    encoded = saved((3000, 3000), "PNG")
    done = subprocess.run([sys.executable, "-c", PEAK], input=encoded, capture_output=True, timeout=60, check=True)
    assert int(done.stdout) > 30_000


def test_a_progressive_jpeg_of_thousands_of_scans_is_refused():
    """Each scan costs a pass over all pixels, whatever its bytes: a known way to burn minutes with kilobytes."""
    whole = saved((64, 64), "JPEG", progressive=True)
    start = whole.rindex(b"\xff\xda")
    scan = whole[start:-2]
    assert open_image(whole[:-2] + scan * 20 + whole[-2:]).size == (64, 64)
    with pytest.raises(NvlmError, match="more than 50 scans"):
        open_image(whole[:-2] + scan * 60 + whole[-2:])


def test_a_picture_behind_the_end_counts_no_scans():
    whole = saved((64, 64), "JPEG", progressive=True)
    assert open_image(whole * 30).size == (64, 64)


def test_a_bmp_of_run_lengths_is_refused_because_it_is_decoded_in_python():
    header = b"BM" + b"\0" * 12 + struct.pack("<IiiHHI", 40, 9, 9, 1, 8, 1) + b"\0" * 2000
    with pytest.raises(NvlmError, match="a BMP file with run lengths"):
        open_image(header)


def test_reading_a_structure_copies_no_pixels():
    file = saved((3000, 2000), "BMP")
    tracemalloc.start()
    structure_of(file)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 100_000


# --- memory comes back

MEMORY = """
import io, sys
from PIL import Image
import psutil
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.model.image_tiler import ImageTiler, TilingSpec

def saved(size, format_name):
    file = io.BytesIO()
    Image.new("RGB", size, "white").save(file, format_name, **({"method": 0} if format_name == "WEBP" else {}))
    return file.getvalue()

spec = TilingSpec(tile_size=448, min_tiles=1, max_tiles=6, use_thumbnail=True, tokens_per_tile=256)
tiler = ImageTiler(spec, threads=2)
small, large = saved((3000, 3000), sys.argv[1]), saved((9000, 8900), sys.argv[1])
damaged = large[: len(large) // 2]
for _ in range(3):
    tiler.tiles([small, small])
process = psutil.Process()
before = process.memory_info().rss
for _ in range(2):
    tiler.tiles([large, large])
    try:
        tiler.tiles([large, damaged])
    except NvlmError:
        pass
print(process.memory_info().rss / before)
"""


@pytest.mark.needs("serve")
@pytest.mark.slow
@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP"])
def test_memory_is_back_within_a_tenth_after_several_pictures_of_80_megapixels(format_name):
    done = subprocess.run([sys.executable, "-c", MEMORY, format_name], capture_output=True, timeout=300, check=True)
    assert float(done.stdout) < 1.1
