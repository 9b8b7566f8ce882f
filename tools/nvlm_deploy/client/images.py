"""Images as callers hold them: paths, bytes, open files, Pillow's images, numpy's arrays; each as an encoded file."""

from __future__ import annotations

import io
import os
import re
import reprlib
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Union

from nvlm_deploy.client.values import shown
from nvlm_deploy.errors import NvlmError

if TYPE_CHECKING:
    import numpy as np
    import PIL.Image
    from numpy.typing import NDArray

# an encoded file or where it lies, or pixels: uint8 [height, width], [height, width, 3] or [height, width, 4]
Image = Union[  # two of them are names of libraries that are not imported yet
    str, "os.PathLike[str]", bytes, bytearray, memoryview, BinaryIO, "PIL.Image.Image", "NDArray[np.uint8]"
]
# A gRPC message holds less than 2 GiB; the rest of the request needs little.
MOST_BYTES = 2**31 - 2**20
_CHUNK_BYTES = 2**20
_KINDS = "a path, bytes, an open binary file, a PIL image or a uint8 array [height, width(, 3 or 4)]"
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16")
_NEAREST_PNG_MODES = {"La": "LA", "PA": "RGBA", "RGBa": "RGBA"}  # of all others it is RGB
_FILE_KINDS = (
    (stat.S_ISDIR, "is a folder"),
    (stat.S_ISFIFO, "is a pipe, not a file"),
    (stat.S_ISSOCK, "is a socket, not a file"),
    (lambda mode: not stat.S_ISREG(mode), "is a device, not a file"),
)


def encoded_images(images: Image | Sequence[Image]) -> list[bytes]:
    """Every image as an encoded file; one image needs no list around it.

    Raises NvlmError that numbers the first one that is not an image or cannot be read, and for more bytes than one
    request holds, before they are read.
    """
    several = _as_list(images)
    encoded: list[bytes] = []
    for number, image in enumerate(several, start=1):
        name = "image" if len(several) == 1 else f"image {number} of {len(several)}"
        encoded.append(image_bytes(image, name, most_bytes=MOST_BYTES - sum(map(len, encoded))))
    return encoded


def _as_list(images: object) -> Sequence[object]:
    if isinstance(images, list | tuple):
        return images
    if _is_one(images):
        return [images]
    raise NvlmError(f"images is {shown(images)}, expected a list of images", hint=f"each is {_KINDS}")


def _is_one(value: object) -> bool:
    return isinstance(value, str | os.PathLike | bytes | bytearray | memoryview) or (
        _is_pillow(value) or _is_array(value) or hasattr(value, "read")
    )


def image_bytes(image: object, name: str = "image", *, most_bytes: int = MOST_BYTES) -> bytes:
    """The encoded file as it is, pixels as PNG; NvlmError that begins with `name` for anything else."""
    if isinstance(image, str | os.PathLike):
        encoded = _file_bytes(name, os.fsdecode(image), most_bytes)
    elif isinstance(image, bytes | bytearray | memoryview):
        encoded = _plain_bytes(name, image)
    elif _is_pillow(image):
        encoded = _png_of_pillow(name, image)
    elif _is_array(image):
        encoded = _png_of_array(name, image)
    elif hasattr(image, "read"):
        encoded = _stream_bytes(name, image, most_bytes)
    else:
        raise NvlmError(f"{name}: {shown(image)} is not an image", hint=f"give {_KINDS}")
    if not encoded:
        rewind = "an open file is read from where it stands: `seek(0)`" if hasattr(image, "read") else None
        raise NvlmError(f"{name}: there are no bytes in it", hint=rewind)
    _require_size(name, len(encoded), most_bytes)
    return encoded


def _is_pillow(value: object) -> bool:
    import PIL.Image

    return isinstance(value, PIL.Image.Image)


def _is_array(value: object) -> bool:
    import numpy as np

    return isinstance(value, np.ndarray)


def _require_size(name: str, size_bytes: int, most_bytes: int) -> None:
    if size_bytes > most_bytes:
        raise NvlmError(
            f"{name}: {size_bytes:,} bytes, and {most_bytes:,} more fit into the request",
            hint="a request holds less than 2 GiB: make the image smaller, or send fewer",
        )


def _file_bytes(name: str, path: str, most_bytes: int) -> bytes:
    if not path:
        raise NvlmError(f"{name}: the path is empty", hint="give the path of a JPEG, PNG or WebP file")
    label = path if len(path) <= 300 else reprlib.repr(path)
    try:
        found = os.stat(path)  # noqa: PTH116  # a path may hold what Path objects to
        for is_kind, words in _FILE_KINDS:
            if is_kind(found.st_mode):
                raise NvlmError(f"{name}: {label} {words}", hint="give the path of a JPEG, PNG or WebP file on a disk")
        _require_size(f"{name}: {label}", found.st_size, most_bytes)
        return Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the path
        raise _missing(name, path, label) from None
    except OSError as problem:
        raise NvlmError(f"{name}: {label} cannot be read: {problem.strerror}") from problem


def _missing(name: str, path: str, label: str) -> NvlmError:
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/|data:", path):
        return NvlmError(f"{name}: {label} is a URL, expected a file", hint="download it, then give the file's path")
    return NvlmError(f"{name}: {label} does not exist", hint="give the path of a JPEG, PNG or WebP file")


def _plain_bytes(name: str, image: bytes | bytearray | memoryview) -> bytes:
    if isinstance(image, memoryview) and (image.format not in ("B", "b", "c") or image.ndim != 1):
        raise NvlmError(
            f"{name}: a memoryview of format {image.format!r} with {image.ndim} dimensions is not an encoded file",
            hint="give pixels as a numpy array, and an encoded file as bytes",
        )
    return bytes(image)


def _stream_bytes(name: str, stream: Any, most_bytes: int) -> bytes:
    """What is left of an open file; a chunk at a time, for a file without end must not fill the memory."""
    chunks: list[bytes] = []
    size_bytes = 0
    try:
        while (chunk := _chunk_of(name, stream)) and size_bytes <= most_bytes:
            chunks.append(bytes(chunk))
            size_bytes += len(chunk)
    except (OSError, TypeError, ValueError) as problem:  # closed, not open for reading, or not a file at all
        raise NvlmError(f"{name}: {shown(stream)} cannot be read: {problem}") from problem
    return b"".join(chunks)


def _chunk_of(name: str, stream: Any) -> bytes | bytearray | memoryview:
    chunk = "" if isinstance(stream, io.TextIOBase) and not stream.closed else stream.read(_CHUNK_BYTES)
    if isinstance(chunk, str):
        raise NvlmError(f"{name}: {shown(stream)} is open as text", hint="open the file with mode 'rb'")
    if not isinstance(chunk, bytes | bytearray | memoryview):
        raise NvlmError(f"{name}: reading {shown(stream)} gives {type(chunk).__name__}, expected bytes")
    return chunk


def _png_of_pillow(name: str, image: Any) -> bytes:
    """PNG keeps pixels, transparency and profile; EXIF goes along, for the server may turn the image by it."""
    if 0 in image.size:
        raise NvlmError(f"{name}: a PIL image of {image.width} x {image.height} pixels")
    if image.mode == "F":
        raise NvlmError(f"{name}: a PIL image of mode F", hint="say what its values mean: convert it to L or RGB")
    stream = io.BytesIO()
    try:
        exif = image.getexif()
        if image.mode not in _PNG_MODES:
            image = image.convert(_NEAREST_PNG_MODES.get(image.mode, "RGB"))
        image.save(stream, "PNG", compress_level=1, exif=exif)
    except (OSError, SyntaxError, ValueError) as problem:  # a closed or damaged file behind it
        raise NvlmError(f"{name}: the PIL image cannot be read: {problem}") from problem
    return stream.getvalue()


def _png_of_array(name: str, array: Any) -> bytes:
    import PIL.Image

    is_picture = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if array.dtype != "uint8" or not is_picture or not array.size:
        raise NvlmError(
            f"{name}: an array of {array.dtype} {list(array.shape)}",
            hint="expected uint8 [height, width], [height, width, 3] or [height, width, 4]; a batch: a list of them",
        )
    return _png_of_pillow(name, PIL.Image.fromarray(array))
