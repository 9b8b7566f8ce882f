"""TIFF: the first picture's directory is written anew with the tags that make pixels, behind the file's own data."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.image_file.exif import ORIENTATION_TAG
from nvlm_deploy.image_file.limits import Size
from nvlm_deploy.image_file.structure import MOST_PARTS, ImageStructure, too_many_parts, truncated

KIND = "TIFF"
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 256, 257, 258, 259, 262
_STRIPS, _SAMPLES, _STRIP_ROWS, _STRIP_BYTES, _PLANES = 273, 277, 278, 279, 284
_COLOURS, _TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES, _FORMAT = 320, 322, 323, 324, 325, 339
_FILL_ORDER, _PREDICTOR, _EXTRA_SAMPLES, _DNG_VERSION = 266, 317, 338, 50706
_LISTS = (_STRIPS, _STRIP_BYTES, _TILES, _TILE_BYTES)
# the most values of each tag that is kept; Pillow reads up to 6 samples a pixel
_MOST_VALUES = {
    **dict.fromkeys((_WIDTH, _HEIGHT, _COMPRESSION, _PHOTOMETRIC, _SAMPLES, _STRIP_ROWS, _PLANES, _FILL_ORDER), 1),
    **dict.fromkeys((_PREDICTOR, _TILE_WIDTH, _TILE_HEIGHT), 1),
    **dict.fromkeys((_BITS, _EXTRA_SAMPLES, _FORMAT), 6),
    **dict.fromkeys(_LISTS, MOST_PARTS),
    _COLOURS: 3 * 256,
}
# decoded by Pillow itself or by libtiff's short decoders of streams that fill a strip and end there
_COMPRESSIONS = {1: "none", 5: "LZW", 8: "Deflate", 32773: "PackBits", 32946: "Deflate"}
_OTHER_COMPRESSIONS = {2: "CCITT", 3: "CCITT G3", 4: "CCITT G4", 6: "old JPEG", 7: "JPEG", 34712: "JPEG 2000"}
_PHOTOMETRICS = {0: "white is zero", 1: "black is zero", 2: "RGB", 3: "palette", 5: "CMYK"}
_SHORT, _LONG = 3, 4
_WIDTHS = {1: 1, _SHORT: 2, _LONG: 4}
_LETTERS = {1: "B", _SHORT: "H", _LONG: "I"}
# a small picture in tiles of 512 pixels and more
_SPARE_PIXELS = 1 << 23
# a whole strip by default
_ALL_ROWS = 2**32 - 1


@dataclass(frozen=True)
class _Tag:
    """One entry of a directory: 12 bytes, values of more than 4 bytes elsewhere in the file."""

    kind: int
    count: int
    entry: bytes

    def values(self, encoded: bytes, order: str) -> tuple[int, ...]:
        if self.kind not in _WIDTHS:
            return ()
        size = _WIDTHS[self.kind] * self.count
        place = struct.unpack_from(f"{order}I", self.entry, 8)[0]
        content = self.entry[8 : 8 + size] if size <= 4 else encoded[place : place + size]
        return struct.unpack(f"{order}{self.count}{_LETTERS[self.kind]}", content)


class _Directory:
    """The first picture's tags."""

    def __init__(self, encoded: bytes) -> None:
        self.encoded = encoded
        self.order = "<" if encoded[:1] == b"I" else ">"
        self.tags = self._read()

    def number(self, tag: int, default: int) -> int:
        """The first value of a tag."""
        found = self.tags.get(tag)
        values = found.values(self.encoded, self.order) if found else ()
        return values[0] if values else default

    def count(self, tag: int) -> int:
        found = self.tags.get(tag)
        return found.count if found else 0

    def _require_inside(self, entry: bytes, size: int) -> None:
        if size > 4 and struct.unpack_from(f"{self.order}I", entry, 8)[0] + size > len(self.encoded):
            raise truncated(KIND)

    def _read(self) -> Mapping[int, _Tag]:
        tags: dict[int, _Tag] = {}
        try:
            (start,) = struct.unpack_from(f"{self.order}I", self.encoded, 4)
            (entries,) = struct.unpack_from(f"{self.order}H", self.encoded, start)
        except struct.error:
            raise truncated(KIND) from None
        for place in range(start + 2, start + 2 + 12 * min(entries, MOST_PARTS), 12):
            entry = self.encoded[place : place + 12]
            if len(entry) < 12:
                raise truncated(KIND)
            tag, kind, count = struct.unpack_from(f"{self.order}HHI", entry)
            if tag == _DNG_VERSION:
                raise NvlmError("a camera's raw file (DNG)", hint="save it as JPEG or PNG")
            if tag in _MOST_VALUES:
                _require_sound(tag, kind, count)
                self._require_inside(entry, _WIDTHS[kind] * count)
                tags.setdefault(tag, _Tag(kind, count, entry))
            elif tag == ORIENTATION_TAG and kind in _WIDTHS and count == 1:
                tags.setdefault(tag, _Tag(kind, count, entry))
        return tags


def size_of(encoded: bytes) -> Size:
    """Read width and height of the first picture."""
    directory = _Directory(encoded)
    return directory.number(_WIDTH, 0), directory.number(_HEIGHT, 0)


def structure_of(encoded: bytes) -> ImageStructure:
    """Write a directory with nothing but what makes pixels; the data stays where it is."""
    directory = _Directory(encoded)
    size = size_of(encoded)
    _require_readable(directory)
    _require_bounded(directory, size)
    pad = b"\0" * (len(encoded) % 2)
    start = struct.pack(f"{directory.order}I", len(encoded) + len(pad))
    parts: list[bytes | memoryview] = [encoded[:4], start, memoryview(encoded)[8:], pad, _written(directory)]
    is_inverted = directory.number(_PHOTOMETRIC, 0) == 0 and directory.number(_BITS, 1) == 16
    orientation = directory.number(ORIENTATION_TAG, 1)
    return ImageStructure(KIND, size, parts, orientation if 1 <= orientation <= 8 else 1, inverted=is_inverted)


def _written(directory: _Directory) -> bytes:
    """In the order of tags, as the format wants it; no picture follows."""
    entries = [tag.entry for number, tag in sorted(directory.tags.items()) if number != ORIENTATION_TAG]
    return struct.pack(f"{directory.order}H", len(entries)) + b"".join(entries) + b"\0\0\0\0"


def _require_sound(tag: int, kind: int, count: int) -> None:
    if tag in _LISTS and count > MOST_PARTS:
        raise too_many_parts(KIND, "strips or tiles")
    if kind not in _WIDTHS or not 1 <= count <= _MOST_VALUES[tag]:
        raise NvlmError(f"the image is damaged: TIFF tag {tag} has {count:,} values of type {kind}")


def _require_readable(directory: _Directory) -> None:
    """Raise NvlmError naming a compression or a colour space that is not read."""
    compression = directory.number(_COMPRESSION, 1)
    if compression not in _COMPRESSIONS:
        name = _OTHER_COMPRESSIONS.get(compression, f"unknown ({compression})")
        raise NvlmError(
            f"a TIFF file with {name} compression; none, LZW, Deflate and PackBits are read", hint="save it as PNG"
        )
    photometric, bits = directory.number(_PHOTOMETRIC, 0), directory.number(_BITS, 1)
    if photometric not in _PHOTOMETRICS or bits > 16 or directory.number(_FORMAT, 1) != 1:
        raise NvlmError(
            "a TIFF file of another colour space, or of samples that are not whole numbers of up to 16 bits; "
            "grey, palette, RGB and CMYK are read",
            hint="save it as PNG",
        )


def _require_bounded(directory: _Directory, size: Size) -> None:
    """Raise NvlmError for tiles larger than the picture needs, or more strips than it has room for."""
    width, height = size
    is_tiled = _TILES in directory.tags
    across, down = directory.number(_TILE_WIDTH, 0), directory.number(_TILE_HEIGHT, 0)
    if not is_tiled:
        across, down = width, min(directory.number(_STRIP_ROWS, _ALL_ROWS), height)
    if across < 1 or down < 1 or not _is_bounded(size, across, down):
        raise NvlmError(f"the image is damaged: a TIFF of {width} x {height} pixels in tiles of {across} x {down}")
    planes = directory.number(_SAMPLES, 1) if directory.number(_PLANES, 1) == 2 else 1
    expected = ceil(width / across) * ceil(height / down) * planes
    found = directory.count(_TILES if is_tiled else _STRIPS)
    if found != expected:
        raise NvlmError(f"the image is damaged: a TIFF with {found:,} strips or tiles, expected {expected:,}")


def _is_bounded(size: Size, across: int, down: int) -> bool:
    """Whether whole tiles, which are what is decoded, have no more than a few times the picture's pixels."""
    padded = [ceil(side / tile) * tile for side, tile in zip(size, (across, down), strict=True)]
    return padded[0] * padded[1] <= 4 * size[0] * size[1] + _SPARE_PIXELS
