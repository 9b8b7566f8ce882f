"""BMP: uncompressed pixels are read as they lie."""

from __future__ import annotations

import struct

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.image_file.limits import Size
from nvlm_deploy.image_file.structure import ImageStructure, truncated

KIND = "BMP"
HEADER_SIZES = (12, 40, 52, 56, 64, 108, 124)
_UNCOMPRESSED = (0, 3)
# Pillow decodes run lengths in Python, which takes minutes for a large file
_COMPRESSIONS = {1: "run lengths", 2: "run lengths", 4: "a JPEG inside", 5: "a PNG inside", 6: "alpha masks"}


def size_of(encoded: bytes) -> Size:
    """Read width and height; a negative height is a picture from top to bottom."""
    if len(encoded) < 54 and not (len(encoded) >= 26 and encoded[14] == 12):
        raise truncated(KIND)
    if encoded[14] == 12:
        width, height = struct.unpack_from("<HH", encoded, 18)
        return width, height
    width, height = struct.unpack_from("<Ii", encoded, 18)
    return width, abs(height)


def structure_of(encoded: bytes) -> ImageStructure:
    """Take the whole file: it holds little else than pixels."""
    size = size_of(encoded)
    compression = 0 if encoded[14] == 12 else struct.unpack_from("<I", encoded, 30)[0]
    if compression not in _UNCOMPRESSED:
        name = _COMPRESSIONS.get(compression, f"compression {compression}")
        raise NvlmError(f"a BMP file with {name}; uncompressed ones are read", hint="save it as PNG")
    return ImageStructure(KIND, size, [encoded])
