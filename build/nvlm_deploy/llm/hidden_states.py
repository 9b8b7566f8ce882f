"""Hidden states of the calibration samples between two layers, and how far a calibration has come, on disk."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType

import torch

from nvlm_deploy.checkpoint.unfinished import (
    PROGRESS_NAME,
    checksum_of,
    read_states,
    record_progress,
    recorded_progress,
)
from nvlm_deploy.checkpoint.writer import write_safetensors

# Samples go through a layer together, behind one another, until so many tokens are reached: a linear reads its weights
# once for all of them
TOKENS_PER_RUN = 1024
_NAME = "states"


@dataclass(frozen=True)
class Run:
    """Samples that go through the layers together, one behind the other: nothing is padded."""

    first_sample: int
    lengths: tuple[int, ...]

    def sample_at(self, token: int) -> int:
        """The number of the sample that a token of the run belongs to."""
        ends = torch.tensor(self.lengths).cumsum(0)
        return self.first_sample + int((ends <= token).sum())

    def positions(self, device: torch.device) -> torch.Tensor:
        """[1, tokens], from 0 in each sample."""
        return torch.cat([torch.arange(length, device=device) for length in self.lengths])[None]

    def mask(self, device: torch.device) -> torch.Tensor | None:
        """True where a token may look, [1, 1, tokens, tokens]; None for a single sample, which is simply causal."""
        if len(self.lengths) == 1:
            return None
        sample = torch.repeat_interleave(torch.tensor(self.lengths, device=device))
        return ((sample[:, None] == sample[None]).tril())[None, None]


@dataclass
class HiddenStates:
    """Runs' hidden states [tokens, hidden] in order: in memory while they fit, the others in a folder of their own.

    `checksums` are of those in the folder, by the number of their run.
    """

    folder: Path
    memory_bytes: int
    checksums: dict[int, int] = field(default_factory=dict)
    held: dict[int, torch.Tensor] = field(default_factory=dict)

    def put(self, number: int, states: torch.Tensor) -> None:
        if sum(other.nbytes for other in self.held.values()) + states.nbytes <= self.memory_bytes:
            self.held[number] = states
        else:
            write_safetensors(self._path(number), {_NAME: states})
            self.checksums[number] = checksum_of(states)

    def take(self, number: int) -> torch.Tensor:
        """What is in memory is gone after this; what is in the folder stays.

        Raises DamagedStatesError for a file with another byte, or for none.
        """
        if number in self.held:
            return self.held.pop(number)
        return read_states(self._path(number), _NAME, self.checksums.get(number))

    def _path(self, number: int) -> Path:
        return self.folder / f"run-{number:05d}.safetensors"


@dataclass(frozen=True)
class Finished:
    """How many layers are behind it, the amax found in them, the runs, and the checksums of their hidden states."""

    layers: int
    runs: Sequence[Run]
    amax: Mapping[str, float]
    checksums: Mapping[int, int]

    @property
    def tokens(self) -> int:
        return sum(sum(run.lengths) for run in self.runs)


@dataclass(frozen=True)
class CalibrationState:
    """A folder of its own: what is recorded there under another `digest` counts as nothing.

    A layer's hidden states are written before they are recorded, and the former ones removed after that: a run killed
    at any time leaves one layer whole.
    """

    folder: Path
    digest: str
    memory_bytes: int

    def finished(self) -> Finished | None:
        """What is recorded here; what a killed run had not finished, and what does not count, is removed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        finished = self._recorded()
        self._remove_others(None if finished is None else finished.layers)
        return finished

    def hidden_states(self, layers: int, checksums: Mapping[int, int] = MappingProxyType({})) -> HiddenStates:
        """After so many layers."""
        return HiddenStates(self._path(layers), self.memory_bytes, dict(checksums))

    def record(self, finished: Finished) -> None:
        """From here a killed run goes on."""
        record_progress(self.folder, self.digest, asdict(finished))
        self._remove_others(finished.layers)

    def _recorded(self) -> Finished | None:
        document = recorded_progress(self.folder, self.digest)
        if document is None:
            return None
        runs = [Run(run["first_sample"], tuple(run["lengths"])) for run in document["runs"]]
        checksums = {int(number): checksum for number, checksum in document["checksums"].items()}
        return Finished(document["layers"], runs, document["amax"], checksums)

    def _remove_others(self, layers: int | None) -> None:
        kept = {self.folder / PROGRESS_NAME, *([] if layers is None else [self._path(layers)])}
        for path in set(self.folder.iterdir()) - kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _path(self, layers: int) -> Path:
        return self.folder / f"layer-{layers:03d}"


def runs_of(samples: Iterable[torch.Tensor]) -> Iterator[tuple[Run, torch.Tensor]]:
    """Samples [tokens, hidden] put behind one another, until the next would pass TOKENS_PER_RUN."""
    waiting: list[torch.Tensor] = []
    first = 0
    for sample in samples:
        if waiting and sum(map(len, waiting)) + len(sample) > TOKENS_PER_RUN:
            yield Run(first, tuple(map(len, waiting))), torch.cat(waiting)
            first, waiting = first + len(waiting), []
        waiting.append(sample)
    if waiting:
        yield Run(first, tuple(map(len, waiting))), torch.cat(waiting)


def samples_digest_of(samples: Iterable[torch.Tensor]) -> str:
    """SHA-256 over all values, types and shapes."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(f"{sample.dtype} {list(sample.shape)}".encode() + b"\0")
        digest.update(sample.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
