"""What one request's images may cost."""

from __future__ import annotations

from dataclasses import dataclass

from nvlm_deploy.errors import NvlmError

MEBIBYTE = 1 << 20
SCALE_DOWN = "scale it down first: the model never sees more than its tiles"
# Pillow refuses more than this in GIF and TIFF files, whatever is asked of it
MOST_PIXELS = 178_000_000

Size = tuple[int, int]


@dataclass(frozen=True)
class ImageLimits:
    """The most bytes and pixels of one image, and the most pixels of all images of a request.

    A JPEG of 89 megapixels has about 30 MB, and Pillow holds it in 360 MB: 4 bytes a pixel. 89 megapixels is Pillow's
    own warning level. A request of 200 megapixels is 16 photographs of a 12-megapixel phone.
    """

    max_image_bytes: int = 32 * MEBIBYTE
    max_image_pixels: int = 89_000_000
    max_request_pixels: int = 200_000_000

    def require_bytes(self, found: int) -> None:
        """Raise NvlmError for a file of more bytes than are read."""
        if found > self.max_image_bytes:
            raise NvlmError(f"the image has {found:,} bytes, the limit is {self.max_image_bytes:,}", hint=SCALE_DOWN)

    def require_pixels(self, size: Size) -> None:
        """Raise NvlmError for a size without pixels, or with more than are decoded."""
        width, height = size
        if width < 1 or height < 1:
            raise NvlmError(f"the image has {width} x {height} pixels")
        if width * height > self.max_image_pixels:
            found = f"{width} x {height} pixels ({width * height:,})"
            raise NvlmError(f"the image has {found}, the limit is {self.max_image_pixels:,}", hint=SCALE_DOWN)

    def require_request(self, sizes: list[Size]) -> None:
        """Raise NvlmError where all images of a request have too many pixels together."""
        found = sum(width * height for width, height in sizes)
        if found > self.max_request_pixels:
            raise NvlmError(
                f"the request's {len(sizes)} images have {found:,} pixels together, the limit is "
                f"{self.max_request_pixels:,}",
                hint="scale them down first, or send them in several requests",
            )
