"""One decoder layer that remembers the largest magnitudes of its weights and of what passes through it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from nvlm_deploy.checkpoint.reader import Checkpoint
from nvlm_deploy.checkpoint.resumable import in_threads
from nvlm_deploy.checkpoint.soundness import SoundChunks, magnitude
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.llm.hidden_states import Run
from nvlm_deploy.llm.threads import one_torch_thread_each
from nvlm_deploy.model.decoder import PREFIX, DecoderLayer, rotary_tables
from nvlm_deploy.model.device import compute_device
from nvlm_deploy.model.spec import DecoderSpec
from nvlm_deploy.model.vision import require_shapes

# linears that see the same input; TensorRT-LLM fuses each group, so a group has one pair of scales (contract A.6)
FUSED_LINEARS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


class ObservedLayer:
    """One decoder layer that remembers the largest magnitude of what passes through it."""

    def __init__(self, checkpoint: Checkpoint, spec: DecoderSpec, index: int, dtype: torch.dtype) -> None:
        self.spec, self.device = spec, compute_device()
        with torch.device("meta"):
            self.layer = DecoderLayer(spec).eval()
        self.observed = Observed(f"model.layers.{index}")
        prefix = f"{PREFIX}{self.observed.layer}."
        require_shapes(self.layer, checkpoint, prefix=prefix)
        self.layer.load_state_dict(self._weights(checkpoint, prefix, dtype), assign=True)
        for group in FUSED_LINEARS:
            self.layer.get_submodule(group[0]).register_forward_pre_hook(self.observed.input_hook(group[0]))

    @torch.inference_mode()
    def advance(self, states: torch.Tensor, run: Run) -> torch.Tensor:
        """The layer's output for one run's hidden states [tokens, hidden]."""
        self.observed.run = run
        states = states.to(self.device)
        rotary = rotary_tables(run.positions(self.device), self.spec, states.dtype)
        output: torch.Tensor = self.layer(states[None], rotary, run.mask(self.device), self.observed)[0]
        self.observed.finite("output", output, token_axis=0)
        return output.cpu()

    def _weights(self, checkpoint: Checkpoint, prefix: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Read, not mapped: mapped pages would count as memory a second time."""
        weights = {
            name: torch.empty(tensor.shape, dtype=dtype, device=self.device)
            for name, tensor in self.layer.state_dict().items()
        }
        by_size = sorted(weights, key=lambda name: -weights[name].numel())
        with one_torch_thread_each():
            amax = in_threads(lambda name: _filled(weights[name], checkpoint, prefix + name), by_size)
        linears = {f"{linear}.weight" for group in FUSED_LINEARS for linear in group}
        for name, value in zip(by_size, amax, strict=True):
            if name in linears:
                self.observed.found[name] = value
        return weights


class Observed:
    """What was found in a layer. It knows nothing of the weights, whose memory is given back with the layer."""

    def __init__(self, layer: str) -> None:
        self.layer, self.run = layer, Run(0, ())
        self.found: dict[str, torch.Tensor] = {}

    def amax(self) -> dict[str, float]:
        """All that was found. Raises NvlmError for an input that was zero in every sample."""
        for name, value in self.found.items():
            if value == 0:
                raise NvlmError(f"{self.layer}.{name} was zero in all samples", hint="calibrate with real prompts")
        return {f"{self.layer}.{name}": value.item() for name, value in self.found.items()}

    def input_hook(self, linear: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        """Records what a linear is given."""

        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            self._record(f"{linear}.input", inputs[0], token_axis=1)

        return hook

    def update(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A LayerCache that keeps nothing: the layer hands over what a real cache would store."""
        self._record("self_attn.keys", keys, token_axis=2)
        self._record("self_attn.values", values, token_axis=2)
        return keys, values

    def finite(self, name: str, x: torch.Tensor, *, token_axis: int) -> torch.Tensor:
        """The magnitude of x. Raises NvlmError naming the sample whose tokens are not finite."""
        value = magnitude(x)
        if not torch.isfinite(value):
            tokens = (~x.isfinite()).movedim(token_axis, 0).flatten(1).any(dim=1)
            sample = self.run.sample_at(int(tokens.nonzero()[0]))
            raise NvlmError(f"{self.layer}.{name} holds NaN or infinity in calibration sample {sample}")
        return value

    def _record(self, name: str, x: torch.Tensor, *, token_axis: int) -> None:
        value = self.finite(name, x, token_axis=token_axis)
        self.found[name] = torch.maximum(self.found[name], value) if name in self.found else value


def _filled(weight: torch.Tensor, checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """The amax of a tensor of the checkpoint, whose values are now in `weight`."""
    chunks, row = SoundChunks(name, checkpoint.chunks(name)), 0
    for chunk in chunks:
        weight[row : row + len(chunk)] = chunk
        row += len(chunk)
    return chunks.amax
