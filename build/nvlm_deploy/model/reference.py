"""The reference decoder: runs a TensorRT-LLM checkpoint, FP8 or BF16, in torch, with the checkpoint's own bytes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from nvlm_deploy.checkpoint.trtllm import TrtllmCheckpoint, read_checkpoint
from nvlm_deploy.checkpoint.trtllm_layout import ACTIVATION_SCALE, FP8, WEIGHTS_SCALE, LayoutTensor
from nvlm_deploy.model.decoder import Decoder, plain_linear
from nvlm_deploy.model.fp8 import Fp8Linear


def decoder_from_trtllm(checkpoint: TrtllmCheckpoint | Path, dtype: torch.dtype = torch.float32) -> Decoder:
    """The decoder of a checkpoint or its folder, for inference; all ranks' parts are joined in one process.

    `dtype` is that of the activations, and of the weights that are not FP8. Raises NvlmError as read_checkpoint does.
    """
    if isinstance(checkpoint, Path):
        checkpoint = read_checkpoint(checkpoint)
    with torch.device("meta"):
        decoder = Decoder(checkpoint.spec, fp8_linear if checkpoint.quant_algo == FP8 else plain_linear)
    decoder.load_state_dict(_state(checkpoint, dtype), assign=True)
    return decoder.requires_grad_(False).eval()


def fp8_linear(_name: str, inputs: int, outputs: int, bias: bool) -> nn.Module:
    """An Fp8Linear of the right shape, to be filled from a state dict; a LinearFactory of model.decoder."""
    scale = torch.ones(1)
    codes = torch.empty(outputs, inputs, dtype=torch.float8_e4m3fn)
    return Fp8Linear(codes, scale, scale, torch.empty(outputs) if bias else None)


def _state(checkpoint: TrtllmCheckpoint, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """State dict of the decoder, with Hugging Face's names and the buffers of Fp8Linear."""
    state: dict[str, torch.Tensor] = {}
    tensors = {tensor.name: tensor for tensor in checkpoint.layout.tensors}
    for tensor in checkpoint.layout.tensors:
        if tensor.dtype == "F8_E4M3":
            state |= _fp8_state(checkpoint, tensor, tensors)
        elif tensor.sources:
            state |= _by_source(checkpoint, tensor, dtype)
    return state


def _by_source(checkpoint: TrtllmCheckpoint, tensor: LayoutTensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensor's rows given back to the Hugging Face tensors they came from."""
    merged = checkpoint.merged_tensor(tensor).to(dtype)
    rows = tensor.source_rows(checkpoint.spec)
    return dict(zip(tensor.sources, merged.split(rows), strict=True))


def _fp8_state(
    checkpoint: TrtllmCheckpoint, tensor: LayoutTensor, tensors: dict[str, LayoutTensor]
) -> dict[str, torch.Tensor]:
    """Buffers of Fp8Linear for every linear fused in one FP8 weight: they share both scales."""
    module = tensor.name.removesuffix(".weight")
    weight_scale = checkpoint.merged_tensor(tensors[f"{module}.{WEIGHTS_SCALE}"]).reshape(())
    activation_scale = checkpoint.merged_tensor(tensors[f"{module}.{ACTIVATION_SCALE}"]).reshape(())
    state: dict[str, torch.Tensor] = {}
    for source, codes in _by_source(checkpoint, tensor, torch.float32).items():
        linear = source.removesuffix(".weight")
        state[source] = codes
        state[f"{linear}.product_scale"] = weight_scale * activation_scale
        state[f"{linear}.activation_scale"] = activation_scale
    return state
