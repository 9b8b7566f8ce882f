"""How far an operation, or the whole encoder, may be off: from the unit roundoff of the types it computes in.

An operation is fed with values that its input type holds exactly, and the reference computes from the same values. What
remains is the rounding inside the operation: at most three results of the base type lie in it (a product, a bias, a
scale). A result rounded to nearest is off by at most u = 2**-p of itself (p significant bits) and by 0.4 u in the root
mean square, three of them by 3 u and 0.7 u. Sums are accumulated in float32; that counts only where the type is float32
itself, hence SUMS.

| healthy graphs, in u         | largest error | root mean square | median channel | channel at 95 % | scale of a norm |
|------------------------------|---------------|------------------|----------------|-----------------|-----------------|
| BF16 and FP16, but attention | 1.7           | 0.8              | 0.6            | 1.6             | 1.5             |
| FP32, in 64 u                | 0.2           | 0.1              | 0.1            | 1.7             | 0.3             |
| FP8 linears                  | 1.3           | 0.7              | 0.8            | 1.4             |                 |
| allowed                      | 4             | 2                | 2              | 8               | 3               |

Measured on the trained small model, on random checkpoints of its shapes with and without dummy heads, with a residual
channel of 2000 times the others, and on two blocks and the projector at the released width. Attention stands apart:
softmax makes a relative error of what is rounded in the scores, so that it grows with them (largest error 1.7 u where
they reach 5, 3.6 u at 13, 17 u at 82; root mean square 0.9, 2.1 and 3.5 u), hence `amplification`: 1.6, 2.6 and 11.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from onnx_ir import DataType

from nvlm_deploy.vision.numerics.compare import TAIL, Difference

UNIT_ROUNDOFF: Mapping[DataType, float] = {
    DataType.FLOAT: 2.0**-24,
    DataType.FLOAT16: 2.0**-11,
    DataType.BFLOAT16: 2.0**-8,
    DataType.FLOAT8E4M3FN: 2.0**-4,
}
# float32 sums over up to 29568 products, erf and exp of another library
SUMS = 64
LARGEST_ERROR, ROOT_MEAN_SQUARE, TAIL_ERROR, SCALE = 4, 2, 8, 3
# erf of another library near -1, times four; what the probes look for is ten times as much
PROBE_ERROR = 1e-3
# scores that double what attention's rounding amounts to
DOUBLING_SCORES = 8.0

# the whole encoder: lowest cosine of a tile's embeddings
END_COSINE: Mapping[str, float] = {"fp32": 0.99999, "bf16": 0.999, "fp16": 0.999, "fp8": 0.99}


@dataclass(frozen=True)
class Bounds:
    """What a Difference must keep; see compare.py for the measures."""

    cosine: float = -math.inf
    error: float = math.inf
    channel: float = math.inf
    tail: float = math.inf
    scale: float = math.inf

    def broken(self, found: Difference) -> list[str]:
        """Every measure that is out of bounds, in words; NaN is."""
        if found.bad_values:
            return [f"{found.bad_values} values are NaN or infinite"]
        measures = (
            (found.error <= self.error, f"max relative error {found.error:.2g} (bound {self.error:.2g})"),
            (found.cosine >= self.cosine, f"cosine {found.cosine:.6f} (bound {self.cosine:.6f})"),
            (
                found.channel <= self.channel,
                f"error of the median channel {found.channel:.2g} (bound {self.channel:.2g})",
            ),
            (
                found.tail <= self.tail,
                f"error of the channel at {TAIL:.0%} {found.tail:.2g} (bound {self.tail:.2g})",
            ),
            (found.scale <= self.scale, f"scale error {found.scale:.2g} (bound {self.scale:.2g})"),
        )
        return [text for holds, text in measures if not holds]


def roundoff_of(computes_in: Collection[DataType]) -> float:
    """Of the coarsest type among an operation's results."""
    return max((UNIT_ROUNDOFF.get(element_type, 0.0) for element_type in computes_in), default=0.0)


def operation_bounds(roundoff: float, *, has_scale: bool = False, amplification: float = 1.0) -> Bounds:
    """For an operation whose results are rounded so; `has_scale`: it is a norm."""
    unit = amplification * max(roundoff, SUMS * UNIT_ROUNDOFF[DataType.FLOAT])
    relative = ROOT_MEAN_SQUARE * unit
    scale = SCALE * unit if has_scale else math.inf
    return Bounds(1 - relative**2 / 2, LARGEST_ERROR * unit, channel=relative, tail=TAIL_ERROR * unit, scale=scale)


def probe_bounds(roundoff: float, *, amplification: float = 1.0) -> Bounds:
    """On made-up inputs (probes.py) all values have the same few roundings: only the largest error means something."""
    return Bounds(error=max(LARGEST_ERROR * amplification * roundoff, PROBE_ERROR))


def amplification_of_scores(largest_score: float) -> float:
    """By how much softmax amplifies rounding, for scores of at most this magnitude."""
    return 1 + largest_score / DOUBLING_SCORES


def end_bounds(precision: str) -> Bounds:
    return Bounds(cosine=END_COSINE[precision])
