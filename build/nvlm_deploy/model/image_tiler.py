"""All images of a request become tiles, on threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.image_file.memory import return_large_blocks
from nvlm_deploy.image_file.opening import AS_VIEWED, decoded, judged_size, shown_size, structure_of
from nvlm_deploy.image_file.reading import ImageReading
from nvlm_deploy.image_file.structure import ImageStructure
from nvlm_deploy.image_file.text import file_of
from nvlm_deploy.model.spec import TilingSpec
from nvlm_deploy.model.tiling import room_for, tile_count, tiles_from_image, write_grid, write_thumbnail, write_tiles

if TYPE_CHECKING:
    from PIL import Image

Result = TypeVar("Result")


class _Job(NamedTuple):
    """One image of a request: what it is called in errors, its file, and where its tiles belong."""

    name: str
    structure: ImageStructure
    tiles: npt.NDArray[np.uint8]


class ImageTiler:
    """Tiles of all images of a request, on a fixed number of threads: Pillow lets go of the GIL while it works.

    A request holds no more decoded images than there are threads, however many it sends.
    """

    def __init__(self, tiling: TilingSpec, *, threads: int = 1, reading: ImageReading = AS_VIEWED) -> None:
        if threads < 1:
            raise NvlmError(f"{threads} threads to prepare images, expected at least 1")
        self.tiling = tiling
        self.threads = threads
        self.reading = reading
        return_large_blocks()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="tiles")

    def warm_up(self) -> None:
        """Load what is loaded at first use: Pillow's readers."""
        from PIL import Image

        Image.init()
        tiles_from_image(Image.new("RGB", (2, 2)), self.tiling)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def tiles(self, images: Sequence[bytes]) -> tuple[npt.NDArray[np.uint8], list[int]]:
        """uint8 [tiles, tile_size, tile_size, 3] of all images in their order, and how many are each image's.

        An image is a file's bytes, or base64 or a data URL of them. Raises NvlmError that numbers the first image that
        cannot be read, after every thread has stopped. All headers are judged before the first image is decoded.
        """
        structures = self._judged(images)
        counts = [tile_count(*shown_size(structure, self.reading), self.tiling) for structure in structures]
        tiles = room_for(sum(counts), self.tiling)
        parts = np.split(tiles, np.cumsum(counts, dtype=int))[:-1]
        self._write_all([_Job(*job) for job in zip(_names(images), structures, parts, strict=True)])
        return tiles, counts

    def _judged(self, images: Sequence[bytes]) -> list[ImageStructure]:
        """The structures of all images, once bytes and pixels of every one, and of all together, are known to fit."""
        names, limits = _names(images), self.reading.limits
        files = [_named(name, file_of, element, limits) for name, element in zip(names, images, strict=True)]
        sizes = [_named(name, judged_size, encoded, limits) for name, encoded in zip(names, files, strict=True)]
        limits.require_request(sizes)
        return [_named(name, structure_of, encoded) for name, encoded in zip(names, files, strict=True)]

    def _write_all(self, jobs: Sequence[_Job]) -> None:
        """An image per thread; a few images on more threads have their two resizes side by side."""
        if len(jobs) >= self.threads:
            self._run([partial(self._write, job) for job in jobs])
            return
        pictures = self._run([partial(self._open, job) for job in jobs])
        pairs = [(picture, self.tiling, job.tiles) for picture, job in zip(pictures, jobs, strict=True)]
        self._run([partial(write, *pair) for pair in pairs for write in (write_grid, write_thumbnail)])

    def _write(self, job: _Job) -> None:
        write_tiles(self._open(job), self.tiling, job.tiles)

    def _open(self, job: _Job) -> Image.Image:
        return _named(job.name, decoded, job.structure, self.reading)

    def _run(self, tasks: Sequence[Callable[[], Result]]) -> list[Result]:
        """Results in the order of the tasks, or the first one's error once none of them runs any more."""
        running: list[Future[Result]] = [self._pool.submit(task) for task in tasks]
        try:
            return [future.result() for future in running]
        finally:
            for future in running:
                future.cancel()
            wait(running)


def _names(images: Sequence[bytes]) -> list[str]:
    return [f"image {number} of {len(images)}" for number in range(1, len(images) + 1)]


def _named(name: str, read: Callable[..., Result], *arguments: object) -> Result:
    """What `read` returns; its NvlmError says of which image."""
    try:
        return read(*arguments)
    except NvlmError as problem:
        message, hint = problem.message, problem.hint
    # raised here, so that no traceback holds the half-made picture
    raise NvlmError(f"{name}: {message}", hint=hint)
