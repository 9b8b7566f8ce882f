"""How far a calibration of the encoder has come, on disk: hidden states after a stage, and the amax found so far."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nvlm_deploy.artifacts import replace_file
from nvlm_deploy.checkpoint.stream import tensor_stream
from nvlm_deploy.checkpoint.unfinished import read_states, record_progress, recorded_progress
from nvlm_deploy.manifest import sha256_of_json

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from nvlm_deploy.checkpoint.reader import Checkpoint
    from nvlm_deploy.model.spec import VisionSpec


@dataclass(frozen=True)
class Finished:
    """How many stages are behind it, the amax found in them, and the checksums of each picture's hidden states."""

    stages: int = 0
    amax: Mapping[str, float] = field(default_factory=dict)
    checksums: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class CalibrationState:
    """A folder of its own: what is recorded there under another `digest` counts as nothing.

    A stage's hidden states are written before they are recorded, and the former ones removed after that: a run killed
    at any time leaves one stage whole.
    """

    folder: Path
    digest: str

    def finished(self) -> Finished:
        """What is recorded here; what a killed run had not finished, and what does not count, is removed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        finished = self._recorded()
        self._remove_others(finished.stages)
        return finished

    def hidden_states(self, finished: Finished) -> Iterator[torch.Tensor]:
        """After its stages, float32 [tiles, positions, hidden] of each picture in order.

        Raises DamagedStatesError for a file with another byte than was written, or for none.
        """
        for name in sorted(finished.checksums):
            yield read_states(self._path(finished.stages), name, finished.checksums[name])

    def write(self, stages: int, shapes: Sequence[tuple[int, ...]], states: Iterable[torch.Tensor]) -> dict[str, int]:
        """Hidden states after so many stages, read back before they have their name; the checksum of each."""
        names = [f"picture.{number:06d}" for number in range(len(shapes))]
        header = {name: ("F32", shape) for name, shape in zip(names, shapes, strict=True)}
        with replace_file(self._path(stages)) as path, tensor_stream(path, header) as stream:
            for name, tensor in zip(names, states, strict=True):
                stream.put(name, tensor)
        return stream.checksums

    def record(self, finished: Finished) -> None:
        """From here a killed run goes on."""
        record_progress(self.folder, self.digest, asdict(finished))
        self._remove_others(finished.stages)

    def _recorded(self) -> Finished:
        document = recorded_progress(self.folder, self.digest)
        if document is None:
            return Finished()
        return Finished(document["stages"], document["amax"], document["checksums"])

    def _remove_others(self, stages: int) -> None:
        for path in self.folder.glob("*hidden_states.*.safetensors"):
            if path != self._path(stages):
                path.unlink()

    def _path(self, stages: int) -> Path:
        return self.folder / f"hidden_states.{stages}.safetensors"


def calibration_digest(
    checkpoint: Checkpoint, vision: VisionSpec, pictures: Iterable[npt.NDArray[np.uint8]], *, device: str
) -> str:
    """Of all that decides the result: the encoder's weights and mathematics, the pictures, and what computes.

    Reads every weight of the encoder once: 12 GB at full size, against hours of work that must not be mixed up.
    """
    weights = {name: _sha256(checkpoint.tensor(name)) for name in checkpoint.names if name.startswith("vision_model.")}
    tiles = [_sha256(torch.tensor(picture)) for picture in pictures]
    return sha256_of_json([weights, asdict(vision), tiles, device, torch.__version__])


def _sha256(tensor: torch.Tensor) -> str:
    content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode() + b"\0" + content.data).hexdigest()
