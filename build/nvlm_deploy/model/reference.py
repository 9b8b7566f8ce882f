"""The reference decoder: runs a written decoder, FP8 or BF16, in torch, with the checkpoint's own bytes.

It reads TensorRT-LLM checkpoints of any split (contract A) and folders in Hugging Face's layout, plain or unified FP8
(contract D.2). FP8 weights stay FP8; `dtype` is that of the activations and of all other weights.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from nvlm_deploy.checkpoint.hf_layout import INPUT_SCALE, KEY_SCALE, VALUE_SCALE, WEIGHT_SCALE
from nvlm_deploy.checkpoint.reader import Checkpoint
from nvlm_deploy.checkpoint.trtllm import TrtllmCheckpoint, read_checkpoint
from nvlm_deploy.checkpoint.trtllm_layout import (
    ACTIVATION_SCALE,
    KV_CACHE_SCALE,
    PER_CHANNEL_SCALE,
    WEIGHTS_SCALE,
    LayoutTensor,
    rank_file,
)
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.model.decoder import PREFIX, Decoder
from nvlm_deploy.model.fp8_linear import Fp8Linear
from nvlm_deploy.model.linear import InferenceLinear
from nvlm_deploy.model.spec import DecoderSpec, spec_from_checkpoint
from nvlm_deploy.model.vision import require_shapes

# tensors by Hugging Face's names; beside FP8 weights the buffers of Fp8Linear, for an FP8 cache those of the attention
State = dict[str, torch.Tensor]


def decoder_from_folder(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    """The decoder in a folder of either layout. Raises NvlmError as the other two do."""
    is_trtllm = (folder / rank_file(0)).is_file()
    return decoder_from_trtllm(folder, dtype) if is_trtllm else decoder_from_hf(folder, dtype)


def decoder_from_trtllm(checkpoint: TrtllmCheckpoint | Path, dtype: torch.dtype = torch.float32) -> Decoder:
    """The decoder of a TensorRT-LLM checkpoint, for inference; all ranks' parts are joined in one process.

    Raises NvlmError as read_checkpoint does, and for an FP8 weight that holds NaN.
    """
    if isinstance(checkpoint, Path):
        checkpoint = read_checkpoint(checkpoint)
    tensors = {tensor.name: tensor for tensor in checkpoint.layout.tensors}
    state: State = {}
    for tensor in tensors.values():
        if tensor.sources:
            state |= _by_source(checkpoint, tensor, dtype)
        if tensor.dtype == "F8_E4M3":
            state |= _linear_scales(checkpoint, tensor, tensors)
        if tensor.name.endswith(KV_CACHE_SCALE):
            state |= _cache_scales(checkpoint, tensor)
    return _decoder(checkpoint.spec, state)


def decoder_from_hf(checkpoint: Checkpoint | Path, dtype: torch.dtype = torch.float32) -> Decoder:
    """The decoder of a folder in Hugging Face's layout, BF16 or unified FP8, for inference.

    Raises NvlmError for tensors that are missing or misshapen, and for an FP8 weight that holds NaN.
    """
    if isinstance(checkpoint, Path):
        checkpoint = Checkpoint.open(checkpoint)
    # a quantised folder is no source to quantise from, which is what the spec's reader asks
    plain = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    spec = spec_from_checkpoint(replace(checkpoint, config=plain)).decoder
    with torch.device("meta"):
        require_shapes(Decoder(spec), checkpoint, prefix=PREFIX)
    state: State = {}
    for name, value in checkpoint.tensors(PREFIX).items():
        module, _, kind = name.rpartition(".")
        is_scale = kind in _HF_SCALES
        renamed = f"{module.rpartition('.')[0] if kind in _HF_CACHE_SCALES else module}.{_HF_SCALES.get(kind, kind)}"
        state[renamed] = _scale(value) if is_scale else _typed(value, dtype)
    return _decoder(spec, state)


_HF_CACHE_SCALES = {KEY_SCALE: "key_scale", VALUE_SCALE: "value_scale"}
_HF_SCALES = {WEIGHT_SCALE: "weight_scale", INPUT_SCALE: "activation_scale", **_HF_CACHE_SCALES}


def _decoder(spec: DecoderSpec, state: State) -> Decoder:
    """Linears with e4m3 weights become Fp8Linear; everything is taken over as it is."""
    with torch.device("meta"):
        decoder = Decoder(spec, inference_linear)
    for name, value in state.items():
        module, _, kind = name.rpartition(".")
        if value.dtype == torch.float8_e4m3fn:
            decoder.set_submodule(module, _fp8_linear(module, state))
        elif kind in ("key_scale", "value_scale"):
            setattr(decoder.get_submodule(module), kind, value)
    decoder.load_state_dict(state, assign=True)
    return decoder.requires_grad_(False).eval()


def inference_linear(_name: str, inputs: int, outputs: int, bias: bool) -> nn.Module:
    """A LinearFactory of model.decoder, whatever the name."""
    return InferenceLinear(inputs, outputs, bias=bias)


def _fp8_linear(module: str, state: State) -> Fp8Linear:
    codes = state[f"{module}.weight"]
    if bool((codes.view(torch.uint8) & 0x7F == 0x7F).any()):
        raise NvlmError(f"{module}.weight holds NaN", hint="write the decoder checkpoint again")
    if f"{module}.weight_scale" not in state:
        raise NvlmError(f"{module}.weight is FP8 and has no weight_scale", hint="write the decoder checkpoint again")
    optional = (state.get(f"{module}.{kind}") for kind in ("activation_scale", "bias"))
    return Fp8Linear(codes, state[f"{module}.weight_scale"], *optional)


def _by_source(checkpoint: TrtllmCheckpoint, tensor: LayoutTensor, dtype: torch.dtype) -> State:
    """The tensor's rows given back to the Hugging Face tensors they came from."""
    merged = _typed(checkpoint.merged_tensor(tensor), dtype)
    return dict(zip(tensor.sources, merged.split(tensor.source_rows(checkpoint.spec)), strict=True))


def _linear_scales(checkpoint: TrtllmCheckpoint, tensor: LayoutTensor, tensors: dict[str, LayoutTensor]) -> State:
    """Scales for every linear fused in one FP8 weight: they share one, or have their rows' own."""
    module = tensor.name.removesuffix(".weight")
    linears = [source.removesuffix(".weight") for source in tensor.sources]
    if per_channel := tensors.get(f"{module}.{PER_CHANNEL_SCALE}"):
        scales = checkpoint.merged_tensor(per_channel).split(tensor.source_rows(checkpoint.spec))
        return {f"{linear}.weight_scale": scale for linear, scale in zip(linears, scales, strict=True)}
    weight, activation = (
        _scale(checkpoint.merged_tensor(tensors[f"{module}.{kind}"])) for kind in (WEIGHTS_SCALE, ACTIVATION_SCALE)
    )
    shared = {f"{linear}.weight_scale": weight for linear in linears}
    return shared | {f"{linear}.activation_scale": activation for linear in linears}


def _cache_scales(checkpoint: TrtllmCheckpoint, tensor: LayoutTensor) -> State:
    """TensorRT-LLM has one scale for keys and values (contract A.7)."""
    layer = tensor.name.split(".attention.")[0].replace("transformer.", "model.", 1)
    scale = _scale(checkpoint.merged_tensor(tensor))
    return {f"{layer}.self_attn.{kind}": scale for kind in ("key_scale", "value_scale")}


def _scale(value: torch.Tensor) -> torch.Tensor:
    """float32; a scalar when it has one element."""
    return value.float().reshape(() if value.numel() == 1 else value.shape)


def _typed(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return value if value.dtype == torch.float8_e4m3fn else value.to(dtype)
