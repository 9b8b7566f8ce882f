"""The orientation in a block of EXIF. Nothing else of it is read."""

from __future__ import annotations

import struct

ORIENTATION_TAG = 0x0112
_PREFIX = b"Exif\0\0"
_ORDERS = {b"II": "<", b"MM": ">"}
# the values of BYTE, SHORT and LONG
_VALUES = {1: "B", 3: "H", 4: "I"}


def orientation_of(block: bytes) -> int | None:
    """Return 1 to 8, or None where the block names no orientation or cannot be read."""
    tiff = block.removeprefix(_PREFIX)
    order = _ORDERS.get(tiff[:2])
    if order is None:
        return None
    try:
        return _orientation(tiff, order)
    except struct.error:  # the block ends too soon
        return None


def _orientation(tiff: bytes, order: str) -> int | None:
    (start,) = struct.unpack_from(f"{order}I", tiff, 4)
    (entries,) = struct.unpack_from(f"{order}H", tiff, start)
    for place in range(start + 2, start + 2 + 12 * entries, 12):
        tag, kind = struct.unpack_from(f"{order}HH", tiff, place)
        if tag == ORIENTATION_TAG and kind in _VALUES:
            (value,) = struct.unpack_from(order + _VALUES[kind], tiff, place + 8)
            return value if 1 <= value <= 8 else None
    return None
