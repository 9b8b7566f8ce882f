"""A linear layer that multiplies e4m3 operands, as TensorRT-LLM's FP8 linears do; weights stay one byte an element."""

from __future__ import annotations

import threading

import torch
from torch import nn

from nvlm_deploy.model.fp8 import scale_from_amax, to_e4m3, widened
from nvlm_deploy.model.linear import product

# Weight elements widened at a time on a CPU: float32 scratch of 4 MiB, which the caches hold. On two Zen 4 cores an
# 8192 x 8192 weight took 20 ms for one token and 44 ms for eight; held in float32, at 4 times the memory, 12 and 46 ms
BLOCK_ELEMENTS = 1 << 20
# A weight this small keeps its float32 form as well: the calls would cost more than the bytes (0.08 against 0.01 ms for
# 384 x 256). The smallest of NVLM-D-72B's has 8.4 million elements.
SMALL_ELEMENTS = 1 << 18
# x * 256 against weight / 256: the widening leaves the factor out, and powers of two change no bit of any product
_SHIFT = 256.0


class Fp8Linear(nn.Module):
    """x and weight as e4m3 codes, products summed in float32, scales applied to the sum, then the bias.

    One weight scale and one activation scale (TensorRT-LLM's `FP8`), or a weight scale per output channel and an
    activation scale per token, found as the token comes (`FP8_PER_CHANNEL_PER_TOKEN`).
    """

    def __init__(
        self,
        codes: torch.Tensor,
        weight_scale: torch.Tensor,
        activation_scale: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> None:
        """codes float8_e4m3fn [out, in]; weight_scale of one element or [out]; activation_scale of one element, or None
        for dynamic; bias [out]."""
        super().__init__()
        per_channel = weight_scale.ndim == 1 and weight_scale.numel() == len(codes) != 1
        self.register_buffer("weight", codes)
        self.register_buffer("weight_scale", weight_scale.float() if per_channel else weight_scale.float().reshape(()))
        self.register_buffer(
            "activation_scale", None if activation_scale is None else activation_scale.float().reshape(())
        )
        self.register_buffer("bias", bias)
        self.weight: torch.Tensor
        self.weight_scale: torch.Tensor
        self.activation_scale: torch.Tensor | None
        self.bias: torch.Tensor | None
        self._small: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] in any float type -> [..., out] in the same."""
        scale = self.activation_scale
        if scale is None:
            scale = scale_from_amax(x.abs().amax(dim=-1, keepdim=True))
        codes = to_e4m3(x, scale)
        if x.is_cuda:
            return self._on_tensor_cores(codes, scale, x.dtype)
        scaled = self._product(codes) * (scale * self.weight_scale)
        return (scaled if self.bias is None else scaled + self.bias.float()).to(x.dtype)

    def _product(self, codes: torch.Tensor) -> torch.Tensor:
        """codes [..., in] times the weight's, in float32, without scales."""
        if self.weight.numel() <= SMALL_ELEMENTS:
            return product(widened(codes), self._small_weight())
        rows = max(1, BLOCK_ELEMENTS // self.weight.shape[1])
        shifted = widened(codes) * _SHIFT
        products = [product(shifted, _shifted_in_scratch(block)) for block in self.weight.split(rows)]
        return torch.cat(products, dim=-1)

    def _small_weight(self) -> torch.Tensor:
        if self._small is None or self._small[0] is not self.weight:
            self._small = (self.weight, widened(self.weight))
        return self._small[1]

    def _on_tensor_cores(self, codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """NOT RUN on a GPU, none was at hand; on a CPU the same call is tested.

        The kernel applies both scales, one each or one a row each; the latter exists for BF16 results only. Widths must
        be multiples of 16, as all of NVLM-D-72B's are.
        """
        flat, weight_scale = codes.flatten(0, -2), self.weight_scale
        if scale.ndim or weight_scale.ndim:
            scale = scale.reshape(-1, 1).expand(len(flat), 1).contiguous()
            weight_scale = weight_scale.reshape(1, -1).expand(1, len(self.weight)).contiguous()
        multiplied: torch.Tensor = torch._scaled_mm(
            flat, self.weight.t(), scale_a=scale, scale_b=weight_scale, out_dtype=torch.bfloat16
        )
        multiplied = multiplied.unflatten(0, codes.shape[:-1])
        return (multiplied if self.bias is None else multiplied + self.bias).to(dtype)


class _Scratch(threading.local):
    """Where a thread widens blocks of weights; fresh memory for each would be mapped, zeroed and unmapped each time."""

    def __init__(self) -> None:
        self.halves = torch.empty(0, dtype=torch.int16)
        self.floats = torch.empty(0)

    def of(self, elements: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self.halves.numel() < elements:
            self.halves, self.floats = torch.empty(elements, dtype=torch.int16), torch.empty(elements)
        return self.halves[:elements], self.floats[:elements]


_scratch = _Scratch()


def _shifted_in_scratch(codes: torch.Tensor) -> torch.Tensor:
    """float32 values of e4m3 codes divided by 256, valid until the next call on this thread; see `widened`."""
    halves, floats = (buffer.view(codes.shape) for buffer in _scratch.of(codes.numel()))
    halves.copy_(codes.view(torch.int8)).bitwise_left_shift_(7).bitwise_and_(-0x4001)
    return floats.copy_(halves.view(torch.float16))
