"""WebP: the bitstream, its alpha plane and the first frame of an animation are kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.image_file.exif import orientation_of
from nvlm_deploy.image_file.limits import Size
from nvlm_deploy.image_file.structure import MOST_PARTS, ImageStructure, too_many_parts, truncated

KIND = "WebP"
_BITSTREAMS = (b"VP8 ", b"VP8L")
_ANIMATION, _ALPHA = 0x02, 0x10


class _Chunk(NamedTuple):
    """From its name to its last byte, padding left out."""

    name: bytes
    start: int
    end: int

    def content(self, encoded: bytes) -> bytes:
        return encoded[self.start + 8 : self.end]


def size_of(encoded: bytes) -> Size:
    """Read the canvas' width and height from the first chunk."""
    if len(encoded) < 30:
        raise truncated(KIND)
    name, content = encoded[12:16], encoded[20:30]
    if name == b"VP8X":
        return 1 + int.from_bytes(content[4:7], "little"), 1 + int.from_bytes(content[7:10], "little")
    if name == b"VP8L" and content[0] == 0x2F:
        bits = int.from_bytes(content[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if name == b"VP8 " and content[3:6] == b"\x9d\x01\x2a":
        return int.from_bytes(content[6:8], "little") & 0x3FFF, int.from_bytes(content[8:10], "little") & 0x3FFF
    raise NvlmError("the image is damaged: a WebP without the header of its pixels")


def structure_of(encoded: bytes) -> ImageStructure:
    """Find the parts that make pixels."""
    size = size_of(encoded)
    if encoded[12:16] != b"VP8X":
        chunks = list(_chunks(encoded, most=1))
        return ImageStructure(KIND, size, _riff([encoded[chunk.start : chunk.end] for chunk in chunks]))
    found: dict[bytes, _Chunk] = {}
    for chunk in _chunks(encoded):
        found.setdefault(chunk.name, chunk)
    exif = found[b"EXIF"].content(encoded) if b"EXIF" in found else b""
    return ImageStructure(KIND, size, _riff(_extended(encoded, found)), orientation_of(exif) or 1)


def _extended(encoded: bytes, found: dict[bytes, _Chunk]) -> list[bytes]:
    """The header without what it says of metadata; what a first frame leaves free is transparent."""
    flags = encoded[20]
    names = (b"ANIM", b"ANMF") if flags & _ANIMATION else (b"ALPH", *_BITSTREAMS)
    flags = _ANIMATION | _ALPHA if flags & _ANIMATION else flags & _ALPHA
    kept = [encoded[found[name].start : found[name].end] for name in names if name in found]
    if b"VP8 " in found and b"VP8L" in found and not flags & _ANIMATION:
        raise NvlmError("the image is damaged: a WebP with two bitstreams")
    return [encoded[12:20] + bytes([flags]) + encoded[21:30], *kept]


def _chunks(encoded: bytes, most: int = MOST_PARTS) -> Iterator[_Chunk]:
    """All chunks of the container; what lies behind it is no part of the picture."""
    place, last = 12, min(len(encoded), 8 + int.from_bytes(encoded[4:8], "little"))
    for _ in range(most):
        if place + 8 > last:
            return
        length = int.from_bytes(encoded[place + 4 : place + 8], "little")
        end = place + 8 + length
        if end > last:
            raise NvlmError("the image is damaged or truncated: a WebP chunk ends behind the file")
        yield _Chunk(encoded[place : place + 4], place, end)
        place = end + length % 2
    if most == MOST_PARTS:
        raise too_many_parts(KIND, "chunks")


def _riff(chunks: list[bytes]) -> list[bytes | memoryview]:
    padded = [chunk + b"\0" * (len(chunk) % 2) for chunk in chunks]
    return [b"RIFF", (4 + sum(map(len, padded))).to_bytes(4, "little"), b"WEBP", *padded]
