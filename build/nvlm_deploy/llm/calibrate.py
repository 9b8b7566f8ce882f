"""Calibration: the largest magnitudes that reach the decoder's linears, found one layer at a time.

Only one layer is in memory; the samples' hidden states flow from layer to layer unquantised, as ModelOpt's "max"
calibration does, so an amax is never that of an already quantised input.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from nvlm_deploy.artifacts import sha256_of_json, write_text
from nvlm_deploy.checkpoint.reader import Checkpoint, read_json
from nvlm_deploy.checkpoint.resumable import in_threads
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.llm.hidden_states import (
    CalibrationState,
    Finished,
    HiddenStates,
    Run,
    runs_of,
    samples_digest_of,
)
from nvlm_deploy.llm.threads import one_torch_thread_each
from nvlm_deploy.model.decoder import PREFIX, DecoderLayer, rotary_tables
from nvlm_deploy.model.spec import DecoderSpec, ModelSpec
from nvlm_deploy.model.vision import require_shapes
from nvlm_deploy.progress import Progress, silent

log = logging.getLogger(__name__)

# linears that see the same input; TensorRT-LLM fuses each group, so a group has one pair of scales (contract A.6)
FUSED_LINEARS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


# hidden states beyond this go to the disk; a work folder takes all of them
HIDDEN_STATES_BYTES = 1 << 30
# a layer that takes more than this in float32 computes in bfloat16, as the engine will
FLOAT32_LAYER_BYTES = 1 << 30


@dataclass(frozen=True)
class CalibrationResult:
    """Amax by name: `model.layers.N.<linear>.weight`, `.input` of the first linear of each group of FUSED_LINEARS, and
    `model.layers.N.self_attn.keys` / `.values` as they enter the KV cache. `samples_digest` says which samples.
    """

    amax: Mapping[str, float]
    samples: int
    tokens: int
    samples_digest: str = ""

    def save(self, path: Path) -> None:
        """As JSON; a float32 survives the decimal notation bit for bit."""
        write_text(path, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> CalibrationResult:
        """Raises NvlmError for a file that `save` did not write."""
        document = read_json(path)
        try:
            amax = {str(name): float(value) for name, value in document["amax"].items()}
            return cls(amax, int(document["samples"]), int(document["tokens"]), str(document["samples_digest"]))
        except (AttributeError, KeyError, TypeError, ValueError) as problem:
            raise NvlmError(f"{path} is not a calibration: {problem}", hint="calibrate again") from problem


def calibrate(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    samples: Iterable[torch.Tensor],
    *,
    work_folder: Path | None = None,
    samples_digest: str | None = None,
    dtype: torch.dtype | None = None,
    on_progress: Progress = silent,
) -> CalibrationResult:
    """Run every sample through every layer and keep the amax.

    A sample is a prompt's embeddings [tokens, hidden], visual rows in their places; short ones share a run, without
    padding and without seeing one another. `dtype` is what the layers compute in and hidden states are kept in, by
    default as `calibration_dtype` says. On a GPU when there is one.

    Hidden states are in memory up to HIDDEN_STATES_BYTES, the others in a temporary folder. With a `work_folder` they
    are there after every layer, and a run that was killed goes on with the same result; a state of other weights or
    samples, or computed on another kind of device, is not used. `samples_digest`, when the caller can name the samples
    without making them, spares that run from asking for them and every run from holding them all; else it is their
    SHA-256.

    Raises NvlmError for weights, samples or activations that are not finite and for weights or inputs that are all
    zero, naming them.
    """
    decoder, dtype = spec.decoder, dtype or calibration_dtype(spec.decoder)
    if samples_digest is None:
        samples = list(samples)
        samples_digest = samples_digest_of(samples)
    with _state(work_folder, _digest(checkpoint, decoder, [samples_digest, str(dtype)])) as state:
        finished = state.finished()
        if finished is None:
            finished, hidden = _begun(state, (sample.to(dtype) for sample in _checked(samples, decoder)))
        else:
            hidden = state.hidden_states(finished.layers)
        for index in range(finished.layers, decoder.layers):
            report = _Report(on_progress, index, decoder.layers, finished.tokens, decoder.hidden_size * dtype.itemsize)
            after = state.hidden_states(index + 1)
            amax = _through_layer(
                ObservedLayer(checkpoint, decoder, index, dtype), finished.runs, hidden, after, report
            )
            finished, hidden = Finished(index + 1, finished.runs, {**finished.amax, **amax}), after
            state.record(finished)
            log.info("calibrated layer %d of %d", index + 1, decoder.layers)
    count = sum(len(run.lengths) for run in finished.runs)
    return CalibrationResult(finished.amax, count, finished.tokens, samples_digest)


def calibration_dtype(spec: DecoderSpec) -> torch.dtype:
    """float32 where a layer is small; else bfloat16, in a quarter of the time and half of the memory.

    Against float32 that moves an activation's amax by less than 2 % (tests/llm/test_modelopt.py), which is a third of
    e4m3's smallest step; a weight's not at all.
    """
    width, kv_width = spec.heads * spec.head_size, spec.kv_heads * spec.head_size
    parameters = spec.hidden_size * (2 * width + 2 * kv_width + 3 * spec.intermediate_size)
    return torch.float32 if 4 * parameters <= FLOAT32_LAYER_BYTES else torch.bfloat16


def require_weight_amax(name: str, amax: float) -> None:
    """Raises NvlmError for a weight of a linear that cannot be right: not finite, or nothing but zeros."""
    if amax == 0:
        raise NvlmError(
            f"tensor {name} is all zeros", hint="a download that stopped early looks like this: fetch its shard again"
        )
    if not amax < float("inf"):
        raise NvlmError(f"tensor {name} holds NaN or infinity", hint="fetch its shard again")


def magnitude(x: torch.Tensor) -> torch.Tensor:
    """Largest absolute value, a float32 scalar; NaN if there is one. No copy of x is made, unlike x.abs().max()."""
    low, high = x.aminmax()
    return torch.maximum(-low, high).float()


class ObservedLayer:
    """One decoder layer that remembers the largest magnitude of what passes through it."""

    def __init__(self, checkpoint: Checkpoint, spec: DecoderSpec, index: int, dtype: torch.dtype) -> None:
        self.spec, self.device = spec, _device()
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
                require_weight_amax(prefix + name, value.item())
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


def _begun(state: CalibrationState, samples: Iterable[torch.Tensor]) -> tuple[Finished, HiddenStates]:
    runs: list[Run] = []
    hidden = state.hidden_states(0)
    for run, states in runs_of(samples):
        hidden.put(len(runs), states)
        runs.append(run)
    if not runs:
        raise NvlmError("no calibration samples", hint="give at least one; a few hundred prompts are usual")
    finished = Finished(0, runs, {})
    state.record(finished)
    return finished, hidden


def _through_layer(
    layer: ObservedLayer, runs: Sequence[Run], before: HiddenStates, after: HiddenStates, report: _Report
) -> dict[str, float]:
    """The amax found. Nobody needs what is behind the last layer, but it has to be finite all the same."""
    for number, run in enumerate(runs):
        output = layer.advance(before.take(number), run)
        if not report.is_last_layer:
            after.put(number, output)
        report.add(run)
    return layer.observed.amax()


@dataclass
class _Report:
    """Progress in bytes of hidden states, which pass once through every layer."""

    on_progress: Progress
    layer: int
    layers: int
    tokens: int
    bytes_per_token: int
    done_tokens: int = 0

    @property
    def is_last_layer(self) -> bool:
        return self.layer == self.layers - 1

    def add(self, run: Run) -> None:
        self.done_tokens += sum(run.lengths)
        done, total = self.layer * self.tokens + self.done_tokens, self.layers * self.tokens
        self.on_progress("hidden states", done * self.bytes_per_token, total * self.bytes_per_token)


@contextmanager
def _state(work_folder: Path | None, digest: str) -> Iterator[CalibrationState]:
    if work_folder is not None:
        yield CalibrationState(work_folder, digest, memory_bytes=0)
        return
    with TemporaryDirectory(prefix="nvlm-calibration-") as folder:
        yield CalibrationState(Path(folder), digest, HIDDEN_STATES_BYTES)


def _digest(checkpoint: Checkpoint, spec: DecoderSpec, choices: list[str | None]) -> str:
    """Of all that decides the result to the last bit: shards, unchanged; mathematics; samples; what computes, and with
    how many threads, as a product's sums are shared among them.
    """
    shards = [(shard.name, shard.stat().st_size, shard.stat().st_mtime_ns) for shard in checkpoint.shards]
    machine = [_device().type, torch.__version__, torch.get_num_threads()]
    return sha256_of_json([str(checkpoint.folder), shards, asdict(spec), choices, machine])


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _filled(weight: torch.Tensor, checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """The amax of a tensor of the checkpoint, whose values are now in `weight`."""
    amax, row = torch.zeros(()), 0
    for chunk in checkpoint.chunks(name):
        amax = torch.maximum(amax, magnitude(chunk))
        weight[row : row + len(chunk)] = chunk
        row += len(chunk)
    return amax


def _checked(samples: Iterable[torch.Tensor], spec: DecoderSpec) -> Iterator[torch.Tensor]:
    for number, sample in enumerate(samples):
        shape = list(sample.shape)
        if len(shape) != 2 or shape[1] != spec.hidden_size or not 1 <= shape[0] <= spec.max_positions:
            expected = f"[1 to {spec.max_positions}, {spec.hidden_size}]"
            raise NvlmError(f"calibration sample {number} has shape {shape}, expected {expected}")
        if not torch.isfinite(magnitude(sample)):
            raise NvlmError(f"calibration sample {number} holds NaN or infinity")
        yield sample
