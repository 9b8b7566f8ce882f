"""An image that came as text: base64 or a data URL, as in JSON."""

from __future__ import annotations

import binascii
import re
import string

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.image_file.kinds import kind_of, other_name
from nvlm_deploy.image_file.limits import ImageLimits

_SPACE = b" \t\r\n\v\f"
_LETTERS = string.ascii_letters.encode() + string.digits.encode() + b"+/-_"
# what is looked at before anything is known
_HEAD = 1024
_URL = re.compile(rb"([A-Za-z][A-Za-z0-9+.-]{0,31})://")
_DATA = re.compile(rb"(?i)\s*data:([^,]*),")
_IS_DATA = re.compile(rb"(?i)data:")
_OUTSIDE_ALPHABET = re.compile(rb"[^A-Za-z0-9+/_=\s-]")
_ALPHABET = re.compile(rb"[A-Za-z0-9+/_-]{8}")
_ONE_ALPHABET = bytes.maketrans(b"-_", b"+/")
# what a URL escapes of base64, and what line breaks become
_ESCAPES = {b"%2B": b"+", b"%2F": b"/", b"%3D": b"=", b"%0A": b"", b"%0D": b"", b"%20": b"", b"%09": b""}
_RUN = re.compile(rb"(?:[A-Za-z0-9+/]{4})+")
_BROKEN = "the image is broken base64"
_HINT = "send the file's bytes as they are, in base64, or as data:image/png;base64,..."
# characters of white space or escapes that are tolerated for each character of base64
_TOLERATED = 3


def file_of(element: bytes, limits: ImageLimits) -> bytes:
    """Return the bytes of an image file that was sent as they are, in base64, or as a data URL.

    What begins as an image file is one: raw bytes win over text that they might be. A media type that the client
    declares is ignored. Raises NvlmError for broken base64, a URL that would have to be fetched, and too many bytes,
    which are counted before anything is decoded.
    """
    if kind_of(element) is not None:
        limits.require_bytes(len(element))
        return element
    if len(element) > _TOLERATED * _characters(limits.max_image_bytes):
        limits.require_bytes(len(element))
    head = element[:_HEAD].lstrip()
    if _IS_DATA.match(head):
        return _decoded(_data(element), limits)
    if url := _URL.match(head):
        scheme = url[1].decode().lower()
        raise NvlmError(f"the image is a {scheme}:// URL; nothing is fetched", hint=_HINT)
    if other_name(element) is None and _ALPHABET.match(head.translate(None, _SPACE)):
        return _decoded(element, limits, _fault_of(element, head))
    limits.require_bytes(len(element))
    return element


def _characters(size: int) -> int:
    """Base64 of a size, padded."""
    return 4 * (size // 3 + 1)


def _data(element: bytes) -> bytes:
    """The base64 of a data URL."""
    header = _DATA.match(element[:_HEAD])
    if header is None:
        raise NvlmError("the image is a data URL without a comma before its data", hint=_HINT)
    if header[1].split(b";")[-1].strip().lower() != b"base64":
        raise NvlmError("the image is a data URL that is not in base64", hint=_HINT)
    text = element[header.end() :]
    if b"%" in text:
        for escape, plain in _ESCAPES.items():
            text = text.replace(escape, plain).replace(escape.lower(), plain)
    return text


def _fault_of(element: bytes, head: bytes) -> str:
    """Say what an element is that cannot be decoded: a few words may be meant as anything."""
    run = _RUN.match(head.translate(_ONE_ALPHABET, _SPACE))
    start = binascii.a2b_base64(run[0]) if run else b""
    is_image = kind_of(start) is not None or other_name(start) is not None
    return _BROKEN if is_image else f"not an image: {len(element):,} bytes of no known format, nor base64"


def _decoded(text: bytes, limits: ImageLimits, fault: str = _BROKEN) -> bytes:
    """Decode base64 of either alphabet, whose padding may be left out, after judging how many bytes it has."""
    compact = text.translate(_ONE_ALPHABET, _SPACE)
    characters = compact.rstrip(b"=")
    limits.require_bytes(len(characters) * 3 // 4)
    if characters.translate(None, _LETTERS + b"="):
        wrong = _OUTSIDE_ALPHABET.search(text)
        assert wrong is not None
        raise _broken(fault, f"{wrong[0].decode('latin-1')!r} at position {wrong.start() + 1:,} is not of its alphabet")
    if b"=" in characters:
        raise _broken(fault, f"'=' at position {text.index(b'=') + 1:,} is not at its end")
    if len(characters) % 4 == 1:
        raise _broken(fault, f"{len(characters):,} characters, which is one more than a multiple of 4")
    return binascii.a2b_base64(characters + b"=" * (-len(characters) % 4))


def _broken(fault: str, what: str) -> NvlmError:
    return NvlmError(f"{fault}: {what}", hint=_HINT)
