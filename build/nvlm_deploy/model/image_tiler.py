"""All images of a request become tiles, on threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.model.spec import TilingSpec
from nvlm_deploy.model.tiling import (
    MAX_PIXELS,
    open_image,
    opened,
    room_for,
    tile_count,
    tiles_from_image,
    write_grid,
    write_thumbnail,
    write_tiles,
)

if TYPE_CHECKING:
    from PIL import Image

Result = TypeVar("Result")


class _Job(NamedTuple):
    """One image of a request: what it is called in errors, its file, and where its tiles belong."""

    name: str
    encoded: bytes
    tiles: npt.NDArray[np.uint8]


class ImageTiler:
    """Tiles of all images of a request, on a fixed number of threads: Pillow lets go of the GIL while it works.

    A request holds no more decoded images than there are threads, however many it sends.
    """

    def __init__(self, tiling: TilingSpec, *, threads: int = 1, max_pixels: int = MAX_PIXELS) -> None:
        if threads < 1:
            raise NvlmError(f"{threads} threads to prepare images, expected at least 1")
        self.tiling = tiling
        self.threads = threads
        self.max_pixels = max_pixels
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

        Raises NvlmError that numbers the first image that cannot be read, after every thread has stopped.
        """
        counts = [self._tile_count(encoded) for encoded in images]
        tiles = room_for(sum(counts), self.tiling)
        names = [f"image {number} of {len(images)}" for number in range(1, len(images) + 1)]
        parts = np.split(tiles, np.cumsum(counts, dtype=int))[:-1]
        self._write_all([_Job(*job) for job in zip(names, images, parts, strict=True)])
        return tiles, counts

    def _tile_count(self, encoded: bytes) -> int:
        """From the header; 0 if that is bad, which is an error once the images before it are known to be good."""
        try:
            return tile_count(*opened(encoded, self.max_pixels).size, self.tiling)
        except NvlmError:
            return 0

    def _write_all(self, jobs: Sequence[_Job]) -> None:
        """An image per thread; a few images on more threads have their two resizes side by side."""
        if len(jobs) >= self.threads:
            self._run([partial(self._write, job) for job in jobs])
            return
        decoded = self._run([partial(self._open, job) for job in jobs])
        pairs = [(image, self.tiling, job.tiles) for image, job in zip(decoded, jobs, strict=True)]
        self._run([partial(write, *pair) for pair in pairs for write in (write_grid, write_thumbnail)])

    def _write(self, job: _Job) -> None:
        write_tiles(self._open(job), self.tiling, job.tiles)

    def _open(self, job: _Job) -> Image.Image:
        try:
            return open_image(job.encoded, max_pixels=self.max_pixels)
        except NvlmError as problem:
            raise NvlmError(f"{job.name}: {problem.message}", hint=problem.hint) from problem

    def _run(self, tasks: Sequence[Callable[[], Result]]) -> list[Result]:
        """Results in the order of the tasks, or the first one's error once none of them runs any more."""
        running: list[Future[Result]] = [self._pool.submit(task) for task in tasks]
        try:
            return [future.result() for future in running]
        finally:
            for future in running:
                future.cancel()
            wait(running)
