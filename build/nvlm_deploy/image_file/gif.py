"""GIF: the first picture with its palette and transparency is kept."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.image_file.limits import Size
from nvlm_deploy.image_file.structure import MOST_PARTS, Box, ImageStructure, too_many_parts, truncated

KIND = "GIF"
_SCREEN_END = 13
_EXTENSION, _IMAGE, _CONTROL = 0x21, 0x2C, 0xF9


class _First(NamedTuple):
    """Where the first picture starts, where it lies on the screen, and the control block before it."""

    start: int
    box: Box
    control: bytes


def size_of(encoded: bytes) -> Size:
    """Read the screen's size, which a larger first picture widens, as Pillow does it."""
    if len(encoded) < _SCREEN_END:
        raise truncated(KIND)
    width, height = struct.unpack_from("<HH", encoded, 6)
    box = _first(encoded).box
    return max(width, box.right), max(height, box.bottom)


def structure_of(encoded: bytes) -> ImageStructure:
    """Find the parts that make the first picture's pixels."""
    size, first = size_of(encoded), _first(encoded)
    head, pixels = encoded[: _palette_end(encoded)], memoryview(encoded)[first.start :]
    frame = None if first.box == (0, 0, *size) else first.box
    return ImageStructure(KIND, size, [head, first.control, pixels], frame=frame)


def _palette_end(encoded: bytes) -> int:
    flags = encoded[10]
    return _SCREEN_END + (3 << (flags & 7) + 1 if flags & 0x80 else 0)


def _first(encoded: bytes) -> _First:
    """Walk the blocks in a bounded number of steps, sub-blocks among them."""
    place, control, steps = _palette_end(encoded), b"", iter(range(MOST_PARTS))
    for _ in steps:
        block = encoded[place : place + 10]
        if len(block) == 10 and block[0] == _IMAGE:
            left, top, width, height = struct.unpack_from("<HHHH", block, 1)
            return _First(place, Box(left, top, left + width, top + height), control)
        if block[:1] != bytes([_EXTENSION]):
            raise NvlmError("the image is damaged or truncated: a GIF without a picture")
        end = _end_of_blocks(encoded, place + 2, steps)
        if block[1:2] == bytes([_CONTROL]):
            control = encoded[place:end]
        place = end
    raise too_many_parts(KIND, "blocks before its first picture")


def _end_of_blocks(encoded: bytes, place: int, steps: Iterator[int]) -> int:
    for _ in steps:
        if place >= len(encoded):
            raise truncated(KIND)
        length = encoded[place]
        place += 1 + length
        if length == 0:
            return place
    raise too_many_parts(KIND, "blocks before its first picture")
