"""A Sample as the decoder sees it: token embeddings with the visual ones in their places."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from nvlm_deploy.artifacts import replace_file
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.image_file.opening import AS_VIEWED, open_image
from nvlm_deploy.image_file.reading import ImageReading
from nvlm_deploy.model.prompt import PromptBuilder
from nvlm_deploy.model.spec import IM_END, TilingSpec
from nvlm_deploy.model.tiling import tiles_from_image
from nvlm_deploy.samples import PlacedSample, Sample, blamed_on

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch


Found = TypeVar("Found")
# the one array of a stored file
_ARRAY = "embeddings"


@dataclass(frozen=True)
class SampleEmbedder:
    """Everything between a sample and the decoder's first layer.

    `encode` is a vision engine: uint8 [tiles, H, W, 3] -> float32 [tiles, tokens, hidden]; `table` is the decoder's
    embedding table [vocab, hidden].
    """

    prompts: PromptBuilder
    tiling: TilingSpec
    encode: Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]
    table: torch.Tensor
    reading: ImageReading = AS_VIEWED

    def prompt(self, sample: Sample) -> torch.Tensor:
        """Embeddings [tokens, hidden] of the prompt, in the table's type."""
        images = self._tiles(sample)
        return self._with_visual_rows(self._ids(sample, images), images)

    def prompt_ids(self, sample: Sample) -> list[int]:
        """Token ids of the prompt; visual positions hold the id of `<|vision_pad|>`."""
        return self._ids(sample, self._tiles(sample))

    def prompt_and_answer(self, sample: Sample) -> torch.Tensor:
        """As `prompt`, with the reference answer behind it, so that calibration sees what generation will."""
        answer = self.prompts.tokenizer.encode(sample.answer + IM_END, add_special_tokens=False).ids
        return self._joined(self.prompt(sample), answer)

    def _tiles(self, sample: Sample) -> list[npt.NDArray[np.uint8]]:
        return [tiles_of_file(path, self.tiling, self.reading) for path in sample.images]

    def _ids(self, sample: Sample, images: list[npt.NDArray[np.uint8]]) -> list[int]:
        return self.prompts.ids(sample.question, [len(tiles) for tiles in images])

    def _joined(self, prompt: torch.Tensor, ids: list[int]) -> torch.Tensor:
        import torch

        return torch.cat([prompt, self.table[torch.tensor(ids)]])

    def _with_visual_rows(self, ids: list[int], images: list[npt.NDArray[np.uint8]]) -> torch.Tensor:
        import torch

        tokens = torch.tensor(ids)
        embeddings = self.table[tokens]
        places = tokens == self.prompts.pad_token_id
        if not images:
            return embeddings
        rows = torch.cat([torch.from_numpy(self.encode(tiles)).flatten(0, 1) for tiles in images])
        if len(rows) != int(places.sum()):
            raise NvlmError(f"{len(rows)} visual tokens for {int(places.sum())} places in the prompt")
        embeddings[places] = rows.to(embeddings.dtype)
        return embeddings


@dataclass(frozen=True)
class CachedEncoder:
    """A vision engine whose embeddings are kept in a folder: a picture costs minutes on a CPU, and a list repeats some.

    The folder must be of one engine: files are named by tiles alone. A file with another byte than was written, which
    its CRC-32 tells, is made again.
    """

    encode: Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]
    folder: Path

    def __call__(self, tiles: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """uint8 [tiles, H, W, 3] -> float32 [tiles, tokens, hidden]."""
        path = self.folder / f"{hashlib.sha256(str(tiles.shape).encode() + tiles.tobytes()).hexdigest()}.npz"
        found = _stored(path)
        if found is None:
            found = self.encode(tiles)
            _store(path, found)
        return found


def _stored(path: Path) -> npt.NDArray[np.float32] | None:
    """None for a file that is missing or not as it was written."""
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as archive:
            found: npt.NDArray[np.float32] = archive[_ARRAY]
            return found
    except (OSError, ValueError, KeyError, EOFError, NotImplementedError, zipfile.BadZipFile):
        return None


def _store(path: Path, embeddings: npt.NDArray[np.float32]) -> None:
    """By way of memory: numpy's own message about a full disk names none."""
    import numpy as np

    content = io.BytesIO()
    np.savez(content, **{_ARRAY: embeddings})
    with replace_file(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def tiles_of_pictures(
    samples: Iterable[PlacedSample], tiling: TilingSpec, reading: ImageReading = AS_VIEWED
) -> dict[Path, npt.NDArray[np.uint8]]:
    """The tiles of every picture of a list, once each. Raises NvlmError naming the line of one that cannot be read."""
    tiles: dict[Path, npt.NDArray[np.uint8]] = {}
    for place, sample in samples:
        with blamed_on(place):
            tiles |= {path: tiles_of_file(path, tiling, reading) for path in sample.images if path not in tiles}
    return tiles


def tiles_of_file(path: Path, tiling: TilingSpec, reading: ImageReading = AS_VIEWED) -> npt.NDArray[np.uint8]:
    """uint8 [tiles, S, S, 3] of a picture. Raises NvlmError naming a file that cannot be read as one."""
    return of_picture(path, lambda encoded: tiles_from_image(open_image(encoded, reading), tiling))


def of_picture(path: Path, read: Callable[[bytes], Found]) -> Found:
    """What `read` finds in a picture's file, which an NvlmError then names."""
    try:
        return read(path.read_bytes())
    except NvlmError as problem:
        hint = problem.hint or "replace it by a whole JPEG, PNG, WebP, GIF, BMP or TIFF file"
        raise NvlmError(f"{path}: {problem.message}", hint=hint) from problem
