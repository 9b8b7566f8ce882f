"""What is transparent in a picture lies on a background, as in a viewer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nvlm_deploy.image_file.structure import ImageStructure

if TYPE_CHECKING:
    from PIL import Image

Colour = tuple[int, int, int]
_ALPHA_MODES = ("RGBA", "LA", "PA", "La", "RGBa")


def flattened(image: Image.Image, structure: ImageStructure, background: Colour) -> Image.Image | None:
    """Return an RGB picture on a background, None for a picture without transparency.

    An opaque pixel keeps its value, whatever the others are.
    """
    from PIL import Image

    picture = _with_alpha(image, structure)
    if picture is None and structure.frame is None:
        return None
    picture = picture or image.convert("RGB")
    canvas = Image.new("RGB", image.size, background)
    box = structure.frame
    if box is not None:  # an animation's first frame on a larger screen
        picture = picture.crop(box)
    canvas.paste(picture, box[:2] if box else None, picture if picture.mode == "RGBA" else None)
    return canvas


def _with_alpha(image: Image.Image, structure: ImageStructure) -> Image.Image | None:
    """The picture as RGBA, None where it is opaque."""
    if image.mode in _ALPHA_MODES:
        return _unless_all_transparent(_as_rgba(image), structure)
    if structure.transparent is not None:
        return _with_key(image, structure, structure.transparent)
    if "transparency" in image.info:
        return image.convert("RGBA")
    return None


def _as_rgba(image: Image.Image) -> Image.Image:
    if image.mode == "La":
        image = image.convert("LA")
    return image if image.mode == "RGBA" else image.convert("RGBA")


def _unless_all_transparent(rgba: Image.Image, structure: ImageStructure) -> Image.Image | None:
    """A BMP whose alpha is 0 everywhere has none: viewers show it as opaque."""
    is_opaque = structure.kind == "BMP" and rgba.getchannel("A").getextrema() == (0, 0)
    return None if is_opaque else rgba


def _with_key(image: Image.Image, structure: ImageStructure, key: tuple[int, ...]) -> Image.Image:
    """The one colour that a PNG names is transparent, compared in the file's own bits."""
    if structure.bit_depth == 16:
        return _with_sixteen_bit_key(image, structure, key)
    most = (1 << structure.bit_depth) - 1
    scaled = tuple((value & most) * 255 // most for value in key)
    image.info["transparency"] = scaled if image.mode == "RGB" else scaled[0]
    return image.convert("RGBA")


def _with_sixteen_bit_key(image: Image.Image, structure: ImageStructure, key: tuple[int, ...]) -> Image.Image:
    from PIL import Image

    if image.mode != "RGB":
        samples = np.asarray(image)
        is_key, grey = samples == key[0], (samples // 256).astype(np.uint8)
        rgb = Image.fromarray(grey).convert("RGB")
    else:
        high, low = (tuple(value >> shift & 0xFF for value in key) for shift in (8, 0))
        is_key = (np.asarray(image) == high).all(-1)
        if is_key.any():
            is_key &= (np.asarray(_low_bytes(structure)) == low).all(-1)
        rgb = image
    rgba = rgb.convert("RGBA")
    rgba.putalpha(Image.fromarray(np.where(is_key, np.uint8(0), np.uint8(255))))
    return rgba


def _low_bytes(structure: ImageStructure) -> Image.Image:
    """Of 16-bit RGB, the bytes that Pillow drops: it takes the other ones where it is told that they come first."""
    import io

    from PIL.PngImagePlugin import PngImageFile

    image = PngImageFile(io.BytesIO(structure.file()))
    image.tile = [image.tile[0]._replace(args="RGB;16L")]
    image.load()
    return image
