"""What kind of file some bytes are, by their first bytes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.image_file import bmp, gif, jpeg, png, tiff, webp
from nvlm_deploy.image_file.limits import Size
from nvlm_deploy.image_file.structure import ImageStructure

READ = "JPEG, PNG, WebP, GIF, BMP and TIFF are read"
CONVERT = "save it as JPEG or PNG"
# bytes of a file that are looked at
_LOOKED_AT = 1024


class Kind(NamedTuple):
    """A format that is read: how it begins, and how its header is."""

    begins: re.Pattern[bytes]
    size_of: Callable[[bytes], Size]
    structure_of: Callable[[bytes], ImageStructure]


def _begins(pattern: bytes) -> re.Pattern[bytes]:
    return re.compile(pattern, re.DOTALL)


_BMP_SIZES = b"".join(re.escape(bytes([size])) for size in bmp.HEADER_SIZES)
KINDS = (
    Kind(_begins(rb"\xff\xd8\xff"), jpeg.size_of, jpeg.structure_of),
    Kind(_begins(rb"\x89PNG\r\n\x1a\n"), png.size_of, png.structure_of),
    Kind(_begins(rb"RIFF....WEBP"), webp.size_of, webp.structure_of),
    Kind(_begins(rb"GIF8[79]a"), gif.size_of, gif.structure_of),
    Kind(_begins(rb"BM.{12}[" + _BMP_SIZES + rb"]\0\0\0"), bmp.size_of, bmp.structure_of),
    Kind(_begins(rb"II\x2a\x00(?!.{4}CR)|MM\x00\x2a"), tiff.size_of, tiff.structure_of),
)
_OTHERS = (
    (rb".{4}ftyp(hei[cxms]|hev[cxms]|mif1|msf1)", "a HEIC file"),
    (rb".{4}ftypavi[fs]", "an AVIF file"),
    (rb".{4}ftyp(crx )", "a Canon raw file"),
    (rb".{4}ftypqt", "a QuickTime video"),
    (rb".{4}ftyp", "an MP4 video"),
    (rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51", "a JPEG 2000 file"),
    (rb"\0\0\0\x0cJXL \r\n\x87\n|\xff\x0a", "a JPEG XL file"),
    (rb"II\xbc", "a JPEG XR file"),
    (rb"II\x2b\0|MM\0\x2b", "a BigTIFF file"),
    (rb"II\x2a\0.{4}CR|IIU\0|IIRO|FUJIFILM|.MRM", "a camera's raw file"),
    (rb"%PDF-", "a PDF file"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "a PostScript file"),
    (rb"\0\0\x01\0[^\0]", "an ICO file"),
    (rb"\0\0\x02\0[^\0].{3}", "a CUR file"),
    (rb"icns\0", "an ICNS file"),
    (rb"8BPS\0[\x01\x02]", "a PSD file"),
    (rb"gimp xcf", "an XCF file"),
    (rb"DDS \x7c", "a DDS file"),
    (rb"qoif\0", "a QOI file"),
    (rb"v/1\x01", "an OpenEXR file"),
    (rb"#\?(RADIANCE|RGBE)", "a Radiance HDR file"),
    (rb"P[1-7][ \t\r\n#]", "a PNM file"),
    (rb"SIMPLE  =", "a FITS file"),
    (rb"\x8aMNG", "an MNG file"),
    (rb"\x8bJNG", "a JNG file"),
    (rb"AT&TFORM", "a DjVu file"),
    (rb"\xd7\xcd\xc6\x9a|\x01\0\t\0", "a WMF file"),
    (rb"\x01\0\0\0.{36} EMF", "an EMF file"),
    (rb"/\* XPM \*/", "an XPM file"),
    (rb"BPG\xfb", "a BPG file"),
    (rb".{128}DICM", "a DICOM file"),
    (rb"FLIF", "a FLIF file"),
    (rb"RIFF....AVI ", "an AVI video"),
    (rb"RIFF....WAVE", "a WAV file"),
    (rb"\x1aE\xdf\xa3", "a Matroska or WebM video"),
    (rb"PK\x03\x04", "a ZIP archive or an office document"),
    (rb"\x1f\x8b\x08", "a gzip archive"),
    (rb"\xd0\xcf\x11\xe0", "an old office document"),
    (rb"\x7fELF", "a program"),
    (rb"(\xef\xbb\xbf)?\s*(<\?xml.*?|<!--.*?|<!DOCTYPE svg.*?)?<svg[\s>]", "an SVG file"),
    (rb"(?i)(\xef\xbb\xbf)?\s*(<!doctype html|<html)", "an HTML page"),
    (rb"(\xef\xbb\xbf)?\s*<\?xml", "an XML file"),
)
OTHERS = tuple((_begins(pattern), name) for pattern, name in _OTHERS)


def kind_of(encoded: bytes) -> Kind | None:
    """Return the format of a file, None for one that is not read."""
    return next((kind for kind in KINDS if kind.begins.match(encoded)), None)


def required_kind(encoded: bytes) -> Kind:
    """Return the format of a file. Raise NvlmError naming what else it is, as far as that is known."""
    kind = kind_of(encoded)
    if kind is not None:
        return kind
    if not encoded:
        raise NvlmError("the image is empty (0 bytes)")
    if name := other_name(encoded):
        raise NvlmError(f"{name}; {READ}", hint=CONVERT)
    raise NvlmError(f"not an image: {len(encoded):,} bytes of no known format; {READ}")


def other_name(encoded: bytes) -> str | None:
    """Return the name of a format that is known but not read, as "a HEIC file"."""
    looked_at = encoded[:_LOOKED_AT]
    return next((name for pattern, name in OTHERS if pattern.match(looked_at)), None)
