"""An image file becomes an RGB picture."""

from __future__ import annotations

import importlib
import io
from typing import TYPE_CHECKING

import numpy as np

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.image_file.kinds import required_kind
from nvlm_deploy.image_file.limits import ImageLimits, Size
from nvlm_deploy.image_file.reading import ImageReading
from nvlm_deploy.image_file.structure import ImageStructure
from nvlm_deploy.image_file.transparency import flattened

if TYPE_CHECKING:
    from PIL import Image, ImageFile

_READERS = {
    "JPEG": ("PIL.JpegImagePlugin", "JpegImageFile"),
    "PNG": ("PIL.PngImagePlugin", "PngImageFile"),
    "WebP": ("PIL.WebPImagePlugin", "WebPImageFile"),
    "GIF": ("PIL.GifImagePlugin", "GifImageFile"),
    "BMP": ("PIL.BmpImagePlugin", "BmpImageFile"),
    "TIFF": ("PIL.TiffImagePlugin", "TiffImageFile"),
}
AS_VIEWED = ImageReading()


def open_image(encoded: bytes, reading: ImageReading = AS_VIEWED) -> Image.Image:
    """Decode a whole image file to RGB.

    Raises NvlmError for bytes that are no such file, a damaged or truncated one, or more bytes or pixels than the
    limits of `reading` allow, which is judged from the header.
    """
    judged_size(encoded, reading.limits)
    return decoded(structure_of(encoded), reading)


def judged_size(encoded: bytes, limits: ImageLimits) -> Size:
    """Return the stored size, read from the header alone. Raises NvlmError where it is beyond the limits."""
    limits.require_bytes(len(encoded))
    size = required_kind(encoded).size_of(encoded)
    limits.require_pixels(size)
    return size


def structure_of(encoded: bytes) -> ImageStructure:
    """Return the parts of a file that make pixels, and how they are shown."""
    return required_kind(encoded).structure_of(encoded)


def shown_size(structure: ImageStructure, reading: ImageReading) -> Size:
    """Return the size of the picture that `decoded` makes."""
    return structure.upright_size if reading.view == "as_viewed" else structure.size


def decoded(structure: ImageStructure, reading: ImageReading) -> Image.Image:
    """Decode a file to RGB. Raises NvlmError for a damaged one."""
    problem = "it has no pixels"
    try:
        return _rgb(_loaded(structure), structure, reading)
    except NvlmError:
        raise
    except Exception as found:  # Pillow raises OSError, SyntaxError, struct.error and more on damaged files
        problem = str(found)
    # raised here, so that no traceback holds the half-made picture
    raise NvlmError(f"the image is damaged or truncated: {problem}")


def _loaded(structure: ImageStructure) -> Image.Image:
    """By the format's own reader: `Image.open` would try others, and judge the size by another limit."""
    module, name = _READERS[structure.kind]
    image: ImageFile.ImageFile = getattr(importlib.import_module(module), name)(io.BytesIO(structure.file()))
    if image.size != structure.size:
        found, judged = (f"{size[0]} x {size[1]}" for size in (image.size, structure.size))
        raise NvlmError(f"the image is damaged: its header says {judged} pixels, its data {found}")
    image.load()
    return image


def _rgb(image: Image.Image, structure: ImageStructure, reading: ImageReading) -> Image.Image:
    if reading.view == "reference":
        return _opaque(image, structure)
    flat = flattened(image, structure, reading.colour)
    return _upright(_opaque(image, structure) if flat is None else flat, structure.orientation)


def _opaque(image: Image.Image, structure: ImageStructure) -> Image.Image:
    if image.mode == "RGB":  # converting it would copy it: 49 MB for 12 megapixels
        return image
    return _eight_bits(image, structure).convert("RGB")


def _eight_bits(image: Image.Image, structure: ImageStructure) -> Image.Image:
    """A 16-bit grey picture scaled down; Pillow's own conversion would clip all above 255 to white."""
    from PIL import Image

    if not image.mode.startswith("I"):
        return image
    grey = (np.asarray(image) // 256).astype(np.uint8)
    return Image.fromarray(255 - grey if structure.inverted else grey)


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    """Turn and mirror as EXIF's orientation asks for."""
    from PIL.Image import Transpose

    steps = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    return image.transpose(steps[orientation]) if orientation in steps else image
