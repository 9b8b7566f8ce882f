"""What a header says of an image file, and the parts of the file that make its pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.image_file.limits import Size

# Chunks, segments or blocks that are looked at in one file. libpng writes 4,096 chunks for 32 MiB.
MOST_PARTS = 16_384
# orientations of EXIF that exchange width and height
_TURNED = (5, 6, 7, 8)


class Box(NamedTuple):
    """A rectangle of pixels."""

    left: int
    top: int
    right: int
    bottom: int


@dataclass(frozen=True)
class ImageStructure:
    """One image file without what makes no pixels; `size` is as stored, before it is turned upright.

    `frame` is where an animation's first picture lies in it. `transparent` is the colour that a PNG names as
    transparent, in samples of `bit_depth` bits. `inverted` 16-bit grey has 0 as white, which Pillow does not know.
    """

    kind: str
    size: Size
    parts: Sequence[bytes | memoryview]
    orientation: int = 1
    frame: Box | None = None
    transparent: tuple[int, ...] | None = None
    bit_depth: int = 8
    inverted: bool = False

    @property
    def upright_size(self) -> Size:
        """The size as a viewer shows it."""
        width, height = self.size
        return (height, width) if self.orientation in _TURNED else (width, height)

    def file(self) -> bytes:
        """Return the file rebuilt from its parts."""
        return b"".join(self.parts)


def truncated(kind: str) -> NvlmError:
    """The file ends inside its header."""
    return NvlmError(f"the image is damaged or truncated: the {kind} header ends too soon")


def too_many_parts(kind: str, parts: str, most: int = MOST_PARTS) -> NvlmError:
    """The file has more parts than are looked at."""
    return NvlmError(f"the {kind} image has more than {most:,} {parts}", hint="save it again with another program")
