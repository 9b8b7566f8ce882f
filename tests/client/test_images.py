"""Every way a caller may hold an image, and what is no image, by name; the same in both clients."""

from __future__ import annotations

import io
import mmap
import os
import socket
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from nvlm_deploy.client import images as images_module
from nvlm_deploy.client.images import encoded_images, image_bytes
from nvlm_deploy.errors import NvlmError

FILE = b"\x89PNG, not really"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "photo.png").write_bytes(FILE)
    return tmp_path / "photo.png"


def opened_at(content: bytes, position: int) -> io.BytesIO:
    stream = io.BytesIO(content)
    stream.seek(position)
    return stream


def mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def zipped(path: Path) -> object:
    archive = path.with_suffix(".zip")
    with zipfile.ZipFile(archive, "w") as writing:
        writing.writestr("photo.png", FILE)
    return zipfile.ZipFile(archive).open("photo.png")


def spooled(_: Path) -> object:
    file = tempfile.SpooledTemporaryFile()  # noqa: SIM115  # the client reads it
    file.write(FILE)
    file.seek(0)
    return file


class Name(os.PathLike):
    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> bytes:
        return os.fsencode(self.path)


HELD = {
    "str": str,
    "Path": lambda path: path,
    "PathLike of bytes": Name,
    "bytes": lambda path: FILE,
    "bytearray": lambda path: bytearray(FILE),
    "memoryview": lambda path: memoryview(FILE),
    "part of a memoryview": lambda path: memoryview(b"xx" + FILE)[2:],
    "BytesIO": lambda path: io.BytesIO(FILE),
    "BytesIO that was read from": lambda path: opened_at(b"head" + FILE, 4),
    "file": lambda path: path.open("rb"),
    "unbuffered file": lambda path: path.open("rb", buffering=0),
    "spooled file": spooled,
    "file in a zip": zipped,
    "mmap": mapped,
}


@pytest.mark.parametrize("kind", HELD)
def test_an_encoded_file_is_sent_as_it_is_however_it_is_held(client, triton, path, kind) -> None:
    client.ask("go", [HELD[kind](path)]).answer()
    client.ask("go", HELD[kind](path)).answer()
    client.ask("go", (HELD[kind](path), FILE)).answer()
    assert [request["image"] for request in triton.requests] == [[FILE], [FILE], [FILE, FILE]]


def pixels_of(encoded: bytes) -> Image.Image:
    return Image.open(io.BytesIO(encoded))


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3), (5, 7, 4)])
def test_the_pixels_of_an_array_arrive(client, triton, shape) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    client.ask("go", [array]).answer()
    client.ask("go", array[::-1, ::-1]).answer()
    first, second = (pixels_of(request["image"][0]) for request in triton.requests)
    assert np.array_equal(np.asarray(first), array)
    assert np.array_equal(np.asarray(second), array[::-1, ::-1])


@settings(max_examples=100, deadline=None)
@given(
    arrays.arrays(
        st.sampled_from([np.uint8, np.int8, np.uint16, np.float32, np.bool_, np.int64]),
        arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
    )
)
def test_an_array_is_either_the_same_pixels_or_refused_by_its_type_and_shape(array) -> None:
    is_picture = array.dtype == np.uint8 and array.size and (array.ndim == 2 or array.shape[2:] in ((3,), (4,)))
    try:
        encoded = image_bytes(array)
    except NvlmError as refused:
        assert not is_picture
        assert str(array.dtype) in refused.message and str(list(array.shape)) in refused.message
    else:
        assert is_picture
        assert np.array_equal(np.asarray(pixels_of(encoded)), array)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK", "YCbCr", "HSV", "RGBX", "La", "PA", "RGBa"]
)
def test_a_pillow_image_arrives_in_its_own_pixels(client, triton, mode) -> None:
    """Modes that PNG lacks arrive as the RGB or RGBA that Pillow makes of them."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8))
    picture = Image.new("I;16", (9, 6), 513) if mode == "I;16" else converted(picture, mode)
    client.ask("go", picture).answer()
    found = pixels_of(triton.requests[0]["image"][0])
    assert found.format == "PNG"
    expected = picture.convert(found.mode)
    assert found.mode == mode or found.mode in ("LA", "RGB", "RGBA", "I;16")
    assert found.tobytes() == expected.tobytes()


def converted(picture: Image.Image, mode: str) -> Image.Image:
    if mode in ("La", "PA"):
        return picture.convert("LA").convert(mode)
    return picture.convert("RGBA").convert(mode) if mode in ("RGBX", "RGBa") else picture.convert(mode)


def test_a_pillow_image_of_a_file_keeps_what_turns_it(tmp_path) -> None:
    """The server sees the same picture as when it gets the file."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (4, 2), "red").save(tmp_path / "turned.jpg", exif=exif)
    with Image.open(tmp_path / "turned.jpg") as picture:
        encoded = image_bytes(picture)
        assert pixels_of(encoded).getexif()[0x0112] == 6
        assert pixels_of(encoded).tobytes() == picture.tobytes()


def text_file(path: Path) -> object:
    return path.open(encoding="latin-1")


def closed_file(path: Path) -> object:
    file = path.open("rb")
    file.close()
    return file


def closed_picture(path: Path) -> object:
    Image.new("RGB", (2, 2)).save(path)
    picture = Image.open(path)
    picture.close()
    return picture


def cut_picture(path: Path) -> object:
    Image.effect_noise((60, 60), 50).save(path)
    path.write_bytes(path.read_bytes()[:1500])
    return Image.open(path)


def pipe_at(path: Path) -> Path:
    os.mkfifo(path.with_name("pipe"))
    return path.with_name("pipe")


def socket_at(path: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path.with_name("socket")))
    return path.with_name("socket")


class OfNothing:
    def read(self, _size: int) -> None:
        return None


class Awaited:
    def read(self, _size: int) -> dict[str, str]:
        return {}


REFUSED = {
    "None": (lambda path: None, "None .NoneType. is not an image"),
    "int": (lambda path: 3, r"3 \(int\) is not an image"),
    "bool": (lambda path: True, r"True \(bool\)"),
    "dict": (lambda path: {"path": path}, "dict"),
    "list in the list": (lambda path: [path], r"\(list\) is not an image"),
    "generator": (lambda path: (one for one in [path]), "generator"),
    "class": (lambda path: bytes, r"\(type\) is not an image"),
    "array.array": (lambda path: __import__("array").array("B", FILE), "array"),
    "empty str": (lambda path: "", "the path is empty"),
    "missing file": (lambda path: path.with_name("none.png"), r"none\.png does not exist"),
    "file as a folder": (lambda path: path / "x.png", r"x\.png does not exist"),
    "folder": (lambda path: path.parent, "is a folder"),
    "folder, a str": (lambda path: str(path.parent), "is a folder"),
    "this folder": (lambda path: ".", "is a folder"),
    "pipe": (pipe_at, "is a pipe, not a file"),
    "socket": (socket_at, "is a socket, not a file"),
    "device": (lambda path: "/dev/zero", "/dev/zero is a device, not a file"),
    "NUL in a path": (lambda path: "a\0b", "does not exist"),
    "long name": (lambda path: "x" * 5000, "cannot be read: File name too long"),
    "URL": (lambda path: "https://example.com/cat.jpg", r"https://example\.com/cat\.jpg is a URL"),
    "URL, a Path": (lambda path: Path("http://example.com/cat.jpg"), "is a URL"),
    "data URL": (lambda path: "data:image/png;base64,AAAA", "is a URL"),
    "no bytes": (lambda path: b"", "no bytes"),
    "no bytes in a file": (lambda path: io.BytesIO(), "no bytes"),
    "file at its end": (lambda path: opened_at(FILE, len(FILE)), "no bytes"),
    "text file": (text_file, "is open as text"),
    "StringIO": (lambda path: io.StringIO("x"), "is open as text"),
    "stdin": (lambda path: sys.stdin, "text|read"),
    "closed file": (closed_file, "cannot be read: .*closed"),
    "file for writing": (lambda path: path.open("wb"), "cannot be read"),
    "reads nothing": (lambda path: OfNothing(), "gives NoneType, expected bytes"),
    "reads a dict": (lambda path: Awaited(), "gives dict, expected bytes"),
    "memory of numbers": (lambda path: memoryview(np.zeros(3)), "memoryview of format 'd'"),
    "memory of pixels": (lambda path: memoryview(np.zeros((2, 2), np.uint8)), "2 dimensions"),
    "array of numbers": (lambda path: np.zeros((2, 2)), r"an array of float64 \[2, 2\]"),
    "batch": (lambda path: np.zeros((1, 2, 2, 3), np.uint8), r"uint8 \[1, 2, 2, 3\]"),
    "channels first": (lambda path: np.zeros((3, 8, 8), np.uint8), r"uint8 \[3, 8, 8\]"),
    "no pixels": (lambda path: np.zeros((0, 4, 3), np.uint8), r"uint8 \[0, 4, 3\]"),
    "array of paths": (lambda path: np.array([str(path)]), "an array of <U"),
    "picture without pixels": (lambda path: Image.new("RGB", (0, 3)), "0 x 3 pixels"),
    "picture of floats": (lambda path: Image.new("F", (2, 2)), "mode F"),
    "closed picture": (closed_picture, "PIL image cannot be read"),
    "damaged picture": (cut_picture, "PIL image cannot be read"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_image_is_refused_by_name_before_anything_is_sent(client, triton, path, kind) -> None:
    make, telling = REFUSED[kind]
    with pytest.raises(NvlmError, match=f"(?s)^image 2 of 2: .*({telling})") as refused:
        client.ask("go", [FILE, make(path)])
    assert refused.value.exit_code == 2
    assert not triton.requests


@pytest.mark.parametrize(
    "images", [None, 3, True, {"a": FILE}, {FILE}, iter([FILE]), object()], ids=lambda x: type(x).__name__
)
def test_what_is_neither_an_image_nor_a_list_is_refused_by_name(client, images) -> None:
    with pytest.raises(NvlmError, match=rf"images is .*\({type(images).__name__}\), expected a list"):
        client.ask("go", images)


def test_no_images_are_none(client, triton) -> None:
    for images in ((), []):
        client.ask("go", images).answer()
    assert all("image" not in request for request in triton.requests)


def test_a_file_of_more_than_a_message_holds_is_refused_unread(client, tmp_path) -> None:
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(3 * 2**30)
    with pytest.raises(NvlmError, match=r"huge\.png: 3,221,225,472 bytes"):
        client.ask("go", [tmp_path / "huge.png"])


def test_images_share_what_a_message_holds(monkeypatch) -> None:
    monkeypatch.setattr(images_module, "MOST_BYTES", 10)
    assert encoded_images([b"12345", io.BytesIO(b"12345")]) == [b"12345", b"12345"]
    for last in (b"123456", bytearray(b"123456"), io.BytesIO(b"123456")):
        with pytest.raises(NvlmError, match=r"image 2 of 2: 6 bytes, and 5 more fit"):
            encoded_images([b"12345", last])


def test_a_file_without_end_is_given_up() -> None:
    class Endless:
        given = 0

        def read(self, size: int) -> bytes:
            self.given += size
            return bytes(size)

    endless = Endless()
    with pytest.raises(NvlmError, match="fit into the request"):
        image_bytes(endless, most_bytes=5 * 2**20)
    assert endless.given < 10 * 2**20


def test_a_name_that_is_not_ascii_or_not_even_utf_8_is_read(client, triton, tmp_path) -> None:
    for name in ("größe 1.png", b"caf\xe9.png"):
        path = os.path.join(os.fsencode(tmp_path), os.fsencode(name))  # noqa: PTH118
        with open(path, "wb") as file:  # noqa: PTH123
            file.write(FILE)
        client.ask("go", os.fsdecode(path)).answer()
    assert [request["image"] for request in triton.requests] == [[FILE], [FILE]]
