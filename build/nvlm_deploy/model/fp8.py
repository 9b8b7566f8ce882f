"""FP8 (e4m3) arithmetic: scales and casts.

A scale is the *de*quantisation multiplier amax / 448, as TensorRT-LLM's `weights_scaling_factor` and
`activation_scaling_factor` are (contract A.5).
"""

from __future__ import annotations

import torch

E4M3_MAX = 448.0
# 1 MB of float32: with its source and its codes it fits in a core's second-level cache
_BLOCK_VALUES = 1 << 18
# what the bits of e4m3's NaN would mean if they were a number
_NAN_CODE = 480.0
# below this many elements six operations cost more than torch's one
_FEW = 4096


def scale_from_amax(amax: torch.Tensor) -> torch.Tensor:
    """float32 dequantisation multiplier; an all-zero tensor gets scale 1, as in ModelOpt, not a division by zero."""
    wide = amax.float()
    return torch.where(wide > 0, wide, torch.full_like(wide, E4M3_MAX)) / E4M3_MAX


def to_e4m3(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Nearest e4m3 codes of x / scale, which is one number or one for each row, [rows, 1].

    e4m3 has no infinity: clamped before the cast, or 470.0 would become NaN. Divided, not multiplied by 1 / scale, as
    ModelOpt's exporter does: the other way some ties fall to the other side.
    """
    if x.device.type != "cpu" or x.ndim != 2 or x.numel() <= _BLOCK_VALUES:
        return (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return _in_blocks(x, scale.float().reshape(-1, 1))


def _in_blocks(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The same codes in less than half the time: a block's float32 values stay in the cache."""
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn)
    step = max(1, _BLOCK_VALUES // x.shape[1])
    wide = torch.empty(step, x.shape[1])
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        block = wide[: len(x[rows])]
        torch.div(x[rows], scale if len(scale) == 1 else scale[rows], out=block)
        codes[rows] = block.clamp_(-E4M3_MAX, E4M3_MAX)
    return codes


def widened(codes: torch.Tensor) -> torch.Tensor:
    """float32 values of e4m3 codes, exactly.

    torch's own cast does 0.3 billion a second on two cores, this 5. The bits of e4m3 (seeee mmm) moved to where float16
    has them (s0eeee mmm0000000) mean the value / 256, as the exponents' biases are 7 and 15; subnormal codes too.
    """
    if codes.is_cuda or codes.numel() < _FEW:
        return codes.float()
    halves = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(-0x4001)
    values = halves.view(torch.float16).float().mul_(256.0)
    return values.masked_fill_(values.abs() == _NAN_CODE, torch.nan)
