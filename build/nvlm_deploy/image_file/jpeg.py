"""JPEG: frame, tables and scans are kept; comments and APP segments that do not decide colours are left out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.image_file.exif import orientation_of
from nvlm_deploy.image_file.limits import Size
from nvlm_deploy.image_file.structure import ImageStructure, too_many_parts, truncated

KIND = "JPEG"
_START, _END, _SCAN, _APP0, _APP1, _ADOBE, _COMMENT = 0xD8, 0xD9, 0xDA, 0xE0, 0xE1, 0xEE, 0xFE
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# baseline, extended and progressive, each with Huffman or arithmetic codes: what libjpeg decodes
_DECODED_FRAMES = {0xC0, 0xC1, 0xC2, 0xC9, 0xCA}
_PROGRESSIVE = {0xC2, 0xCA}
# markers that stand alone: TEM, the restarts, a repeated start
_ALONE = {0x01, *range(0xD0, 0xD9)}
_MARKER = re.compile(rb"\xff[^\x00\xff]")
_MARKER_IN_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
# a segment has at most 64 KiB, so 32 MiB of metadata are 512 of them
_MOST_SEGMENTS = 2_048
# Bytes without a marker between two segments, which libjpeg skips. More is no JPEG file.
_MOST_JUNK = 65_536
# Each scan costs a pass over all pixels, however few bytes it has. Encoders write up to about 20.
MOST_SCANS = 50
# What libjpeg asks of JFIF is whether it is there; a density or a thumbnail is of no use here.
_PLAIN_JFIF = b"\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"


class _Segment(NamedTuple):
    """From its marker's 0xFF to its last byte."""

    marker: int
    start: int
    end: int

    def content(self, encoded: bytes) -> bytes:
        return encoded[self.start + 4 : self.end]


def size_of(encoded: bytes) -> Size:
    """Read width and height from the frame header."""
    for segment in _segments(encoded):
        if segment.marker in _FRAMES:
            return _frame_size(segment, encoded)
    raise NvlmError("the image is damaged or truncated: a JPEG without a frame header")


def structure_of(encoded: bytes) -> ImageStructure:
    """Find the parts that make pixels, up to the first scan, and all that follows it."""
    parts: list[bytes | memoryview] = [b"\xff\xd8"]
    frames: list[_Segment] = []
    orientation = None
    for segment in _segments(encoded):
        if segment.marker == _APP1 and orientation is None:
            orientation = _orientation(segment.content(encoded))
        if segment.marker in _FRAMES:
            frames.append(segment)
        if kept := _kept(segment, encoded):
            parts.append(kept)
    if len(frames) != 1:
        raise NvlmError(f"the image is damaged: a JPEG with {len(frames)} frame headers")
    _require_few_scans(encoded, frames[0], segment)
    parts.append(memoryview(encoded)[segment.start :])
    return ImageStructure(KIND, _frame_size(frames[0], encoded), parts, orientation or 1)


def _segments(encoded: bytes) -> Iterator[_Segment]:
    """All segments up to the first scan's header, in a bounded number of steps whatever the bytes are."""
    place = 2
    for _ in range(_MOST_SEGMENTS):
        found = _MARKER.search(encoded, place, place + _MOST_JUNK)
        if found is None:
            raise NvlmError("the image is damaged or truncated: a JPEG without a frame header or a scan")
        place, marker = found.end(), encoded[found.start() + 1]
        if marker == _END:
            raise truncated(KIND)
        if marker in _ALONE:
            continue
        segment = _Segment(marker, found.start(), _segment_end(encoded, place))
        yield segment
        if marker == _SCAN:
            return
        place = segment.end
    raise too_many_parts(KIND, "segments before its pixels", _MOST_SEGMENTS)


def _segment_end(encoded: bytes, place: int) -> int:
    length = int.from_bytes(encoded[place : place + 2], "big")
    if length < 2 or place + length > len(encoded):
        raise truncated(KIND)
    return place + length


def _frame_size(segment: _Segment, encoded: bytes) -> Size:
    content = segment.content(encoded)
    if len(content) < 6:
        raise truncated(KIND)
    if segment.marker not in _DECODED_FRAMES or content[0] != 8:
        raise NvlmError("a lossless, hierarchical or 12-bit JPEG file is not read", hint="save it as an ordinary JPEG")
    return int.from_bytes(content[3:5], "big"), int.from_bytes(content[1:3], "big")


def _orientation(content: bytes) -> int | None:
    return orientation_of(content) if content.startswith(b"Exif\0") else None


def _kept(segment: _Segment, encoded: bytes) -> bytes | None:
    """The segment as libjpeg needs it; JFIF and Adobe markers decide how three or four components are coloured."""
    content = segment.content(encoded)
    if segment.marker == _APP0:
        return _PLAIN_JFIF if content.startswith(b"JFIF\0") and len(content) >= 14 else None
    if segment.marker == _ADOBE:
        return encoded[segment.start : segment.end] if content.startswith(b"Adobe") else None
    left_out = 0xE0 <= segment.marker <= 0xEF or segment.marker in (_COMMENT, _SCAN)
    return None if left_out else encoded[segment.start : segment.end]


def _require_few_scans(encoded: bytes, frame: _Segment, scan: _Segment) -> None:
    """Only a frame in several scans is looked through: that takes time with the file's size, as decoding does."""
    components = frame.content(encoded)[5]
    if frame.marker not in _PROGRESSIVE and scan.content(encoded)[:1] == bytes([components]):
        return
    scans, place = 1, scan.end
    while found := _MARKER_IN_SCAN.search(encoded, place):
        place, marker = found.end(), encoded[found.start() + 1]
        if marker == _END:
            return
        scans += marker == _SCAN
        if scans > MOST_SCANS:
            raise too_many_parts(KIND, "scans", MOST_SCANS)
        place += int.from_bytes(encoded[place : place + 2], "big")
