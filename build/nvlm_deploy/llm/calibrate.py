"""Calibration: the largest magnitudes that reach the decoder's linears, found one layer at a time.

Only one layer is in memory; the samples' hidden states flow from layer to layer unquantised, as ModelOpt's "max"
calibration does, so an amax is never that of an already quantised input.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from nvlm_deploy.checkpoint.reader import Checkpoint
from nvlm_deploy.checkpoint.soundness import magnitude
from nvlm_deploy.checkpoint.unfinished import DamagedStatesError, read_sealed_json, write_sealed_json
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.llm.hidden_states import (
    CalibrationState,
    Finished,
    HiddenStates,
    Run,
    runs_of,
    samples_digest_of,
)
from nvlm_deploy.llm.observed import ObservedLayer
from nvlm_deploy.manifest import sha256_of_json
from nvlm_deploy.model.device import compute_device
from nvlm_deploy.model.spec import DecoderSpec, ModelSpec
from nvlm_deploy.progress import Progress, silent
from nvlm_deploy.scratch import scratch_folder

log = logging.getLogger(__name__)

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
        write_sealed_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> CalibrationResult:
        """Raises NvlmError for a file that `save` did not write, or with another byte."""
        try:
            return cls(**read_sealed_json(path) or {})
        except TypeError:
            raise NvlmError(f"{path} is not a calibration, or is damaged", hint="calibrate again") from None

    @classmethod
    def saved(cls, path: Path) -> CalibrationResult | None:
        """As `load`; None where that would raise: a killed run had not got so far."""
        try:
            return cls.load(path)
        except NvlmError:
            return None


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
    samples, computed on another kind of device, or with other bytes than were written, is not used. `samples_digest`,
    when the caller can name the samples without making them, spares that run from asking for them and every run from
    holding them all; else it is their SHA-256.

    Raises NvlmError for weights, samples or activations that are not finite and for weights or inputs that are all
    zero, naming them.
    """
    decoder, dtype = spec.decoder, dtype or calibration_dtype(spec.decoder)
    if samples_digest is None:
        samples = list(samples)
        samples_digest = samples_digest_of(samples)
    with _state(work_folder, _digest(checkpoint, decoder, [samples_digest, str(dtype)])) as state:
        layers = _Layers(checkpoint, decoder, dtype, state, on_progress)
        finished = _resumed(layers)
        if finished is None:
            finished = layers.through(*_begun(state, (sample.to(dtype) for sample in _checked(samples, decoder))))
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


@dataclass(frozen=True)
class _Layers:
    """What samples pass through, and where it is recorded."""

    checkpoint: Checkpoint
    spec: DecoderSpec
    dtype: torch.dtype
    state: CalibrationState
    on_progress: Progress

    def through(self, finished: Finished, hidden: HiddenStates) -> Finished:
        """From the layer that `finished` has got to, whose input `hidden` is, to the last."""
        count, token_bytes = self.spec.layers, self.spec.hidden_size * self.dtype.itemsize
        for index in range(finished.layers, count):
            report = _Report(self.on_progress, index, count, finished.tokens, token_bytes)
            after = self.state.hidden_states(index + 1)
            # without a name here, or the layer would be in memory until after the next one is read
            amax = _through_layer(self._observed(index), finished.runs, hidden, after, report)
            finished = Finished(index + 1, finished.runs, {**finished.amax, **amax}, after.checksums)
            hidden = after
            self.state.record(finished)
            log.info("calibrated layer %d of %d", index + 1, count)
        return finished

    def _observed(self, index: int) -> ObservedLayer:
        return ObservedLayer(self.checkpoint, self.spec, index, self.dtype)


def _resumed(layers: _Layers) -> Finished | None:
    """What a killed run's state leads to; None where there is none to be used.

    Of former layers nothing is left to go back to: where hidden states are damaged, all begins anew.
    """
    finished = layers.state.finished()
    if finished is None:
        return None
    try:
        return layers.through(finished, layers.state.hidden_states(finished.layers, finished.checksums))
    except DamagedStatesError as problem:
        log.warning("%s: calibrating from the first layer again", problem.message)
        return None


def _begun(state: CalibrationState, samples: Iterable[torch.Tensor]) -> tuple[Finished, HiddenStates]:
    runs: list[Run] = []
    hidden = state.hidden_states(0)
    for run, states in runs_of(samples):
        hidden.put(len(runs), states)
        runs.append(run)
    if not runs:
        raise NvlmError("no calibration samples", hint="give at least one; a few hundred prompts are usual")
    finished = Finished(0, runs, {}, hidden.checksums)
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
    with scratch_folder("calibration") as folder:
        yield CalibrationState(folder, digest, HIDDEN_STATES_BYTES)


def _digest(checkpoint: Checkpoint, spec: DecoderSpec, choices: list[str | None]) -> str:
    """Of all that decides the result to the last bit: shards, unchanged; mathematics; samples; what computes, and with
    how many threads, as a product's sums are shared among them.
    """
    machine = [compute_device().type, torch.__version__, torch.get_num_threads()]
    return sha256_of_json([str(checkpoint.folder), checkpoint.shard_states, asdict(spec), choices, machine])


def _checked(samples: Iterable[torch.Tensor], spec: DecoderSpec) -> Iterator[torch.Tensor]:
    for number, sample in enumerate(samples):
        shape = list(sample.shape)
        if len(shape) != 2 or shape[1] != spec.hidden_size or not 1 <= shape[0] <= spec.max_positions:
            expected = f"[1 to {spec.max_positions}, {spec.hidden_size}]"
            raise NvlmError(f"calibration sample {number} has shape {shape}, expected {expected}")
        if not torch.isfinite(magnitude(sample)):
            raise NvlmError(f"calibration sample {number} holds NaN or infinity")
        yield sample
