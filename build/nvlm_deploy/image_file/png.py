"""PNG: IHDR, PLTE, tRNS and IDAT are kept, and the orientation in eXIf is read."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.image_file.exif import orientation_of
from nvlm_deploy.image_file.limits import Size
from nvlm_deploy.image_file.structure import MOST_PARTS, ImageStructure, too_many_parts, truncated

KIND = "PNG"
_HEADER_END = 33
_END_CHUNK = b"\0\0\0\0IEND\xaeB`\x82"
# Colour types. A tRNS chunk names one colour of grey or RGB, and gives alpha to the colours of a palette.
_KEY_SAMPLES = {0: 1, 2: 3}
_PALETTE = 3


class _Chunk(NamedTuple):
    """From its length to its checksum."""

    name: bytes
    start: int
    end: int

    def content(self, encoded: bytes) -> bytes:
        return encoded[self.start + 8 : self.end - 4]

    def is_sound(self, encoded: bytes) -> bool:
        checksum = encoded[self.end - 4 : self.end]
        return zlib.crc32(memoryview(encoded)[self.start + 4 : self.end - 4]).to_bytes(4, "big") == checksum


def size_of(encoded: bytes) -> Size:
    """Read width and height from IHDR, which is the first chunk."""
    if len(encoded) < _HEADER_END:
        raise truncated(KIND)
    if encoded[8:16] != b"\0\0\0\x0dIHDR":
        raise NvlmError("the image is damaged: a PNG without its header IHDR")
    width, height = struct.unpack_from(">II", encoded, 16)
    return width, height


def structure_of(encoded: bytes) -> ImageStructure:
    """Find the parts that make pixels.

    A tRNS chunk with a bad checksum is left out, as libpng does it. An orientation is taken whatever its checksum.
    """
    size, pixels = size_of(encoded), _Spans()
    found: dict[bytes, _Chunk] = {}
    for chunk in _chunks(encoded):
        if chunk.name == b"IDAT":
            pixels.add(chunk.start, chunk.end)
        else:
            found.setdefault(chunk.name, chunk)
    alpha = _alpha(found.get(b"tRNS"), encoded)
    kept = [(chunk.start, chunk.end) for chunk in (found.get(b"PLTE"), alpha) if chunk]
    spans = [(0, _HEADER_END), *kept, *pixels.spans]
    is_whole = spans[-1][1] <= len(encoded)
    return ImageStructure(
        KIND,
        size,
        [*(memoryview(encoded)[start:end] for start, end in spans), _END_CHUNK if is_whole else b""],
        orientation_of(found[b"eXIf"].content(encoded) if b"eXIf" in found else b"") or 1,
        transparent=_key(found.get(b"tRNS"), encoded),
        bit_depth=encoded[24],
    )


class _Spans:
    """Places in a file; neighbours are joined, so that thousands of chunks are one copy."""

    def __init__(self) -> None:
        self.spans: list[tuple[int, int]] = []

    def add(self, start: int, end: int) -> None:
        if self.spans and self.spans[-1][1] == start:
            start = self.spans.pop()[0]
        self.spans.append((start, end))


def _chunks(encoded: bytes) -> Iterator[_Chunk]:
    """All chunks behind the header; a file that ends too soon, or in what is no chunk, has no more."""
    place = _HEADER_END
    for _ in range(MOST_PARTS):
        length, name = int.from_bytes(encoded[place : place + 4], "big"), encoded[place + 4 : place + 8]
        if name == b"IEND" or not name.isalpha():
            return
        end = place + 12 + length
        if end > len(encoded) and name != b"IDAT":
            return
        yield _Chunk(name, place, end)
        place = end
    raise too_many_parts(KIND, "chunks")


def _alpha(chunk: _Chunk | None, encoded: bytes) -> _Chunk | None:
    """A palette's alpha. A chunk that is damaged or of another length is none, as for libpng."""
    is_alpha = chunk and encoded[25] == _PALETTE and 0 < len(chunk.content(encoded)) <= 256
    return chunk if chunk and is_alpha and chunk.is_sound(encoded) else None


def _key(chunk: _Chunk | None, encoded: bytes) -> tuple[int, ...] | None:
    """The samples of the one transparent colour of a grey or RGB picture."""
    samples = _KEY_SAMPLES.get(encoded[25])
    if chunk is None or samples is None or not chunk.is_sound(encoded):
        return None
    content = chunk.content(encoded)
    return struct.unpack(f">{samples}H", content) if len(content) == 2 * samples else None
