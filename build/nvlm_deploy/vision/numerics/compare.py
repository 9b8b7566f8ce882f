"""How far a candidate's values are from the reference's, tile by tile."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch


# of the channels, ordered by their errors; what is wrong in more than the rest of them shows
TAIL = 0.95


def noise_tiles(count: int, size: int, *, seed: int = 0) -> npt.NDArray[np.uint8]:
    """uint8 [count, size, size, 3], every pixel value equally likely."""
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def cosines(found: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Cosine similarity of each tile's embeddings, [tiles] from two [tiles, tokens, hidden]."""
    a, b = (array.reshape(len(array), -1).astype(np.float64) for array in (found, expected))
    similarity: npt.NDArray[np.float64] = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return similarity


@dataclass(frozen=True)
class Difference:
    """Two tensors compared; a tile with a value that is not finite has NaN.

    Per tile: `cosines`, `errors` (largest error over largest magnitude expected), `channels` (relative error of the
    median channel), `tails` (of the channel at TAIL of them, by their errors), `scales` (see `_scale`).
    """

    cosines: tuple[float, ...]
    errors: tuple[float, ...]
    channels: tuple[float, ...]
    tails: tuple[float, ...]
    scales: tuple[float, ...]
    bad_values: int

    @property
    def cosine(self) -> float:
        """The lowest over tiles."""
        return _extreme(min, self.cosines)

    @property
    def error(self) -> float:
        """The highest over tiles."""
        return _extreme(max, self.errors)

    @property
    def channel(self) -> float:
        """The highest over tiles."""
        return _extreme(max, self.channels)

    @property
    def tail(self) -> float:
        """The highest over tiles."""
        return _extreme(max, self.tails)

    @property
    def scale(self) -> float:
        """The highest over tiles."""
        return _extreme(max, self.scales)


def difference(found: torch.Tensor, expected: torch.Tensor, *, roundoff: float = 0.0) -> Difference:
    """Of two float tensors [tiles, ..., channels]; `roundoff` is that of the type they were computed in.

    Raises ValueError when their shapes differ.
    """
    if found.shape != expected.shape:
        raise ValueError(f"shape {list(found.shape)}, expected {list(expected.shape)}")
    a, b = (tensor.double().flatten(1) for tensor in (found, expected))
    similarity = _ratio((a * b).sum(1), a.norm(dim=1) * b.norm(dim=1), (a == b).all(1).double())
    error = (a - b).abs().amax(1)
    middle, tail = _channels(found.double(), expected.double())
    return Difference(
        tuple(similarity.tolist()),
        tuple(_ratio(error, b.abs().amax(1), error).tolist()),
        tuple(middle.tolist()),
        tuple(tail.tolist()),
        tuple(_scale(found.double(), expected.double(), roundoff).tolist()),
        int((~found.isfinite()).sum()),
    )


def _channels(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Relative error, in the root mean square over a tile's tokens, of the median channel and of that at TAIL; [tiles].

    A few channels of thousands decide the cosine and the largest magnitude, and hide what happens in all others. Zero
    channels, as dummy heads have, do not count. For the tail a channel is at least a quarter of the median one: what
    GELU leaves of negative inputs is nearly nothing, and its relative error says as much.
    """
    error, size = ((x.movedim(-1, 1).flatten(2).norm(dim=2)) for x in (a - b, b))
    relative = _ratio(error, size, error * math.nan)
    middle = relative.nanmedian(dim=1).values.nan_to_num(0.0)
    usual = size.where(size > 0, math.nan).nanmedian(dim=1, keepdim=True).values
    relative = relative * (size / size.clamp(min=usual.nan_to_num(0.0) / 4))
    return middle, relative.nanquantile(TAIL, dim=1).nan_to_num(0.0)


def _scale(a: torch.Tensor, b: torch.Tensor, roundoff: float) -> torch.Tensor:
    """How wrong the lengths of a tile's tokens are, times the square root of how many channels make them up; [tiles].

    A norm's divisor is one number per token: a wrong one is a wrong length, which the cosine does not see and which
    drowns in the largest error. Rounding errors of n channels are independent and change the length by their own size
    over sqrt(n), so that this has the size of one rounding error again (root mean square over tokens). Channels count
    by their share, n = sum(b^2)^2 / sum(b^4); but a type of p bits has 2**(p-1) significands and no more independent
    rounding errors, however many channels (seen at 3200 of them in BF16).
    """
    squares = b.square().sum(-1)
    off = _ratio((a * b).sum(-1), squares, (a == b).all(-1).double()) - 1
    channels = _ratio(squares.square(), b.pow(4).sum(-1), squares * 0 + 1)
    independent = channels.clamp(max=0.5 / roundoff) if roundoff else channels
    return (off.square() * independent).flatten(1).mean(1).sqrt()


def _ratio(numerator: torch.Tensor, denominator: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
    """Where there is nothing to divide by, `otherwise`."""
    import torch

    return torch.where(denominator == 0, otherwise, numerator / denominator)


def _extreme(choose: Callable[[Iterable[float]], float], values: tuple[float, ...]) -> float:
    """NaN is the worst of all, whatever `min` and `max` make of it."""
    return math.nan if any(math.isnan(value) for value in values) else choose(values)
