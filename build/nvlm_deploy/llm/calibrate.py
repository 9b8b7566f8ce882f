"""Calibration: the largest magnitudes that reach the decoder's linears, found one layer at a time.

Only one layer is in memory; the samples' hidden states flow from layer to layer in full precision, as ModelOpt's "max"
calibration does, so an amax is never that of an already quantised input.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from nvlm_deploy.artifacts import write_text
from nvlm_deploy.checkpoint.reader import Checkpoint, read_json
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.model.decoder import PREFIX, DecoderLayer, rotary_tables
from nvlm_deploy.model.spec import DecoderSpec, ModelSpec
from nvlm_deploy.model.vision import require_shapes

log = logging.getLogger(__name__)

# linears that see the same input; TensorRT-LLM fuses each group, so a group has one pair of scales (contract A.6)
FUSED_LINEARS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


@dataclass(frozen=True)
class CalibrationResult:
    """Amax by name: `model.layers.N.<linear>.weight`, `.input` of the first linear of each group of FUSED_LINEARS, and
    `model.layers.N.self_attn.keys` / `.values` as they enter the KV cache.
    """

    amax: Mapping[str, float]
    samples: int
    tokens: int

    def save(self, path: Path) -> None:
        """As JSON; a float32 survives the decimal notation bit for bit."""
        write_text(path, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> CalibrationResult:
        """Raises NvlmError for a file that `save` did not write."""
        document = read_json(path)
        try:
            amax = {str(name): float(value) for name, value in document["amax"].items()}
            return cls(amax, int(document["samples"]), int(document["tokens"]))
        except (AttributeError, KeyError, TypeError, ValueError) as problem:
            raise NvlmError(f"{path} is not a calibration: {problem}", hint="calibrate again") from problem


def calibrate(
    checkpoint: Checkpoint, spec: ModelSpec, samples: Sequence[torch.Tensor], *, dtype: torch.dtype = torch.float32
) -> CalibrationResult:
    """Run every sample through every layer and keep the amax.

    A sample is a prompt's embeddings [tokens, hidden], visual rows in their places; samples are never batched, so that
    no padding enters an amax. `dtype` is what the layers compute in. Raises NvlmError for weights, samples or
    activations that are not finite and for weights or inputs that are all zero, naming them.
    """
    decoder = spec.decoder
    _require_samples(samples, decoder)
    hidden = [sample[None].to(dtype) for sample in samples]
    amax: dict[str, float] = {}
    for index in range(decoder.layers):
        layer = ObservedLayer(checkpoint, decoder, index, dtype)
        hidden = [layer.advance(states, number) for number, states in enumerate(hidden)]
        amax |= layer.amax()
        log.info("calibrated layer %d of %d", index + 1, decoder.layers)
    return CalibrationResult(amax, len(samples), sum(len(sample) for sample in samples))


def weight_amax(name: str, weight: torch.Tensor) -> float:
    """Raises NvlmError for a weight of a linear that cannot be right: not finite, or nothing but zeros."""
    amax = magnitude(weight).item()
    if amax == 0:
        raise NvlmError(
            f"tensor {name} is all zeros", hint="a download that stopped early looks like this: fetch its shard again"
        )
    if not amax < float("inf"):
        raise NvlmError(f"tensor {name} holds NaN or infinity", hint="fetch its shard again")
    return amax


def magnitude(x: torch.Tensor) -> torch.Tensor:
    """Largest absolute value, a float32 scalar; NaN if there is one. No copy of x is made, unlike x.abs().max()."""
    low, high = x.aminmax()
    return torch.maximum(-low, high).float()


class ObservedLayer:
    """One decoder layer that remembers the largest magnitude of what passes through it."""

    def __init__(self, checkpoint: Checkpoint, spec: DecoderSpec, index: int, dtype: torch.dtype) -> None:
        self.spec, self.name = spec, f"model.layers.{index}"
        with torch.device("meta"):
            self.layer = DecoderLayer(spec).eval()
        prefix = f"{PREFIX}{self.name}."
        require_shapes(self.layer, checkpoint, prefix=prefix)
        weights = {name: checkpoint.tensor(prefix + name) for name in self.layer.state_dict()}
        self.layer.load_state_dict({name: weight.to(dtype) for name, weight in weights.items()}, assign=True)
        self.found = {
            f"{linear}.weight": torch.tensor(weight_amax(f"{prefix}{linear}.weight", weights[f"{linear}.weight"]))
            for group in FUSED_LINEARS
            for linear in group
        }
        self.sample = 0
        for group in FUSED_LINEARS:
            self._observe_input(group[0])

    @torch.inference_mode()
    def advance(self, states: torch.Tensor, sample: int) -> torch.Tensor:
        """The layer's output for one sample's hidden states [1, tokens, hidden]."""
        self.sample = sample
        positions = torch.arange(states.shape[1], device=states.device)[None]
        rotary = rotary_tables(positions, self.spec, states.dtype)
        output: torch.Tensor = self.layer(states, rotary, None, self)
        self._finite("output", magnitude(output))
        return output

    def update(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A LayerCache that keeps nothing: the layer hands over what a real cache would store."""
        self._record("self_attn.keys", keys)
        self._record("self_attn.values", values)
        return keys, values

    def amax(self) -> dict[str, float]:
        """All that was found. Raises NvlmError for an input that was zero in every sample."""
        for name, value in self.found.items():
            if value == 0:
                raise NvlmError(f"{self.name}.{name} was zero in all samples", hint="calibrate with real prompts")
        return {f"{self.name}.{name}": value.item() for name, value in self.found.items()}

    def _observe_input(self, linear: str) -> None:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            self._record(f"{linear}.input", inputs[0])

        self.layer.get_submodule(linear).register_forward_pre_hook(hook)

    def _record(self, name: str, x: torch.Tensor) -> None:
        value = self._finite(name, magnitude(x))
        self.found[name] = torch.maximum(self.found[name], value) if name in self.found else value

    def _finite(self, name: str, value: torch.Tensor) -> torch.Tensor:
        if not torch.isfinite(value):
            raise NvlmError(f"{self.name}.{name} holds NaN or infinity in calibration sample {self.sample}")
        return value


def _require_samples(samples: Sequence[torch.Tensor], spec: DecoderSpec) -> None:
    if not samples:
        raise NvlmError("no calibration samples", hint="give at least one; a few hundred prompts are usual")
    for number, shape, finite in _described(samples):
        if len(shape) != 2 or shape[1] != spec.hidden_size or not 1 <= shape[0] <= spec.max_positions:
            expected = f"[1 to {spec.max_positions}, {spec.hidden_size}]"
            raise NvlmError(f"calibration sample {number} has shape {shape}, expected {expected}")
        if not finite:
            raise NvlmError(f"calibration sample {number} holds NaN or infinity")


def _described(samples: Sequence[torch.Tensor]) -> Iterator[tuple[int, list[int], bool]]:
    for number, sample in enumerate(samples):
        yield number, list(sample.shape), sample.numel() > 0 and bool(torch.isfinite(magnitude(sample)))
