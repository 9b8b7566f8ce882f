"""x times a weight, transposed, on a CPU: torch's two libraries for it are far apart in speed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable

# From here on oneDNN is faster than MKL, which is what functional.linear takes for float32: on two Zen 4 cores a
# 2048 x 8192 weight took 3.6 ms with MKL and 1.6 with oneDNN for one token, 6.2 and 3.3 for eight, 15 and 11 for 64.
# A 384 x 256 weight took 0.01 and 0.02 ms.
LARGE_ELEMENTS = 1 << 19


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x [..., in] times weight [out, in], plus bias [out]: functional.linear, for inference.

    On a CPU a small weight gives a row the same bits alone as among others: one row is multiplied as two, because the
    kernel for a vector sums in another order than the one for a matrix. An FP8 decoder needs that: a last bit that
    rounds to another e4m3 code changes a sampled answer with the company it is in.
    """
    onednn = _onednn() if weight.dtype == torch.float32 and weight.numel() >= LARGE_ELEMENTS else None
    if onednn is None or weight.device.type != "cpu":
        if x.numel() == x.shape[-1] and not x.is_cuda:
            return functional.linear(x.reshape(1, -1).expand(2, -1), weight, bias)[0].reshape(*x.shape[:-1], -1)
        return functional.linear(x, weight, bias)
    return onednn(x, weight, bias, "none", [], "")


class InferenceLinear(nn.Linear):
    """nn.Linear without gradients, its product by `product`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out]."""
        return product(x, self.weight, self.bias)


def _onednn() -> Callable[..., torch.Tensor] | None:
    """The operator that torch's own compiler puts in the place of a linear layer; not every build has it."""
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
