"""Read and write TensorRT-LLM checkpoints: rank files checked tensor by tensor, split for ranks and merged again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvlm_deploy.artifacts import write_text
from nvlm_deploy.checkpoint.reader import read_header, read_json
from nvlm_deploy.checkpoint.resumable import OpenTensor, TensorFiles, tensor_files
from nvlm_deploy.checkpoint.trtllm_config import config_from_layout, layout_from_config
from nvlm_deploy.checkpoint.trtllm_layout import Layout, LayoutTensor, Split, rank_file
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.model.spec import DecoderSpec
from nvlm_deploy.places import require_folder
from nvlm_deploy.progress import Progress, silent

if TYPE_CHECKING:
    import torch

CONFIG_NAME = "config.json"
_AGAIN = "build the decoder checkpoint again with --force"


@dataclass(frozen=True)
class TrtllmCheckpoint:
    """A checkpoint folder whose config.json and rank files, by their headers, are exactly what the contract says."""

    folder: Path
    config: Mapping[str, Any]
    layout: Layout

    @property
    def spec(self) -> DecoderSpec:
        return self.layout.spec

    @property
    def quant_algo(self) -> str | None:
        """One of QUANT_ALGOS; None is BF16 weights."""
        return self.layout.quant_algo

    def merged_tensor(self, tensor: LayoutTensor) -> torch.Tensor:
        """One tensor of `layout`, as it is without parallelism. Raises NvlmError when ranks disagree about it."""
        from safetensors import safe_open

        name = self.layout.name_on_stage(tensor.name)
        parts = []
        for rank in self.layout.ranks_of(tensor.name):
            with safe_open(self.folder / rank_file(rank), framework="pt") as file:
                parts.append(file.get_tensor(name))
        return merge_tensor(tensor, self.spec, parts)

    def merged(self) -> dict[str, torch.Tensor]:
        """Every tensor by its name without parallelism: layers numbered through, vocabulary without its padding."""
        return {tensor.name: self.merged_tensor(tensor) for tensor in self.layout.tensors}


def read_checkpoint(folder: Path) -> TrtllmCheckpoint:
    """Check config.json and every rank file's header.

    Raises NvlmError naming the key, the rank file or the first tensor that is missing, unexpected or misshapen.
    """
    require_folder(folder, "TensorRT-LLM checkpoint", hint="build it: `nvlm build`")
    config = read_json(folder / CONFIG_NAME)
    try:
        layout = layout_from_config(config)
    except NvlmError as problem:
        raise NvlmError(f"{folder}: {problem.message}", hint=problem.hint) from problem
    for rank in range(layout.parallelism.world_size):
        _require_rank(folder / rank_file(rank), layout.rank_tensors(rank))
    return TrtllmCheckpoint(folder, config, layout)


@dataclass(frozen=True)
class CheckpointWriter:
    """Rank files being filled; each tensor's rows are shared among the ranks as they come."""

    layout: Layout
    files: TensorFiles

    def is_finished(self, tensor: LayoutTensor) -> bool:
        """On every rank that has a part of it, by this run or by the one that was killed."""
        name = self.layout.name_on_stage(tensor.name)
        return all(self.files.is_finished(rank_file(rank), name) for rank in self.layout.ranks_of(tensor.name))

    def put(self, tensor: LayoutTensor, value: torch.Tensor) -> None:
        """Write a tensor that is in memory, given without parallelism."""
        with self.rows(tensor) as rows:
            rows.append(value)

    @contextmanager
    def rows(self, tensor: LayoutTensor) -> Iterator[RowWriter]:
        """For all rows of the tensor, given without parallelism, in order; padding follows by itself."""
        name = self.layout.name_on_stage(tensor.name)
        with ExitStack() as parts:
            ranks = self.layout.ranks_of(tensor.name)
            writer = RowWriter(
                tensor,
                [tensor.held(self.layout.spec, rank, len(ranks)) for rank in range(len(ranks))],
                [parts.enter_context(self.files.tensor(rank_file(rank), name)) for rank in ranks],
            )
            yield writer
            writer.pad()


@dataclass
class RowWriter:
    """One tensor on its way to its ranks, each with the runs it holds."""

    tensor: LayoutTensor
    held: Sequence[Sequence[range]]
    parts: Sequence[OpenTensor]
    rows: int = field(default=0, init=False)

    def append(self, rows: torch.Tensor) -> None:
        """The next rows of the whole tensor."""
        if rows.shape[1:] != self.tensor.shape[1:] or self.rows + len(rows) > self.tensor.shape[0]:
            raise ValueError(f"{self.tensor.name} is {list(self.tensor.shape)}: got {list(rows.shape)} at {self.rows}")
        by_columns = self.tensor.split is Split.COLUMNS
        for runs, part in zip(self.held, self.parts, strict=True):
            for run in runs:
                part.append(rows[:, run.start : run.stop] if by_columns else _within(rows, self.rows, run))
        self.rows += len(rows)

    def pad(self) -> None:
        """Zeros behind the last row. Raises ValueError when rows are missing."""
        if self.rows != self.tensor.shape[0]:
            raise ValueError(f"{self.tensor.name} is {list(self.tensor.shape)}: got {self.rows} rows")
        for part in self.parts:
            if part.missing_bytes:
                part.append_bytes(bytes(part.missing_bytes))


def _within(rows: torch.Tensor, start: int, run: range) -> torch.Tensor:
    """Those of the rows, numbered from `start`, that lie in a run."""
    return rows[max(run.start - start, 0) : max(run.stop - start, 0)]


@contextmanager
def checkpoint_writer(
    folder: Path, layout: Layout, *, identity: str = "", on_progress: Progress = silent
) -> Iterator[CheckpointWriter]:
    """Fill a folder with config.json and rank files, some rows in memory at a time; all read back at the end.

    The folder may hold what a killed run of the same `identity` left.
    """
    headers = {rank_file(rank): layout.rank_tensors(rank) for rank in range(layout.parallelism.world_size)}
    with tensor_files(folder, headers, identity=identity, on_progress=on_progress) as files:
        yield CheckpointWriter(layout, files)
    write_text(folder / CONFIG_NAME, json.dumps(config_from_layout(layout), indent=2) + "\n")
    read_checkpoint(folder)


def split_tensor(
    tensor: LayoutTensor, spec: DecoderSpec, value: torch.Tensor, tensor_rank: int, tensor_parallel: int
) -> torch.Tensor:
    """A rank's part of a whole tensor."""
    import torch

    axis = tensor.split.axis
    pieces = []
    for run in tensor.held(spec, tensor_rank, tensor_parallel):
        piece = value.narrow(axis, min(run.start, value.shape[axis]), _inside(run, value.shape[axis]))
        if piece.shape[axis] < len(run):
            padding = piece.new_zeros((len(run) - piece.shape[axis], *piece.shape[1:]))
            piece = torch.cat([piece, padding], dim=axis)
        pieces.append(piece)
    return torch.cat(pieces, dim=axis).contiguous()


def merge_tensor(tensor: LayoutTensor, spec: DecoderSpec, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The whole tensor from its ranks' parts. Raises NvlmError when two ranks differ in rows that both have."""
    import torch

    axis = tensor.split.axis
    whole = parts[0].new_empty(tensor.shape)
    known = [False] * tensor.shape[axis]
    for rank, part in enumerate(parts):
        offset = 0
        for run in tensor.held(spec, rank, len(parts)):
            size = _inside(run, tensor.shape[axis])
            target, piece = whole.narrow(axis, run.start if size else 0, size), part.narrow(axis, offset, size)
            if size and known[run.start] and not torch.equal(_bytes(target), _bytes(piece)):
                raise NvlmError(f"{tensor.name}: tensor-parallel rank {rank} differs from an earlier one", hint=_AGAIN)
            target.copy_(piece)
            known[run.start : run.start + size] = [True] * size
            offset += len(run)
    return whole


def _inside(run: range, extent: int) -> int:
    """How much of a run lies before the end; the rest is padding."""
    return max(0, min(run.stop, extent) - run.start)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Bytes, so that NaN equals itself and e4m3 compares at all."""
    import torch

    return tensor.contiguous().view(torch.uint8)


def _require_rank(path: Path, expected: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    if not path.is_file():
        raise NvlmError(f"no {path.name} in {path.parent}, which config.json's mapping calls for", hint=_AGAIN)
    found = {info.name: (info.dtype, info.shape) for info in read_header(path)}
    for state, names in (("lacks", expected.keys() - found.keys()), ("has besides", found.keys() - expected.keys())):
        if names:
            raise NvlmError(f"{path} {state} {len(names)} tensor(s), first {min(names)}", hint=_AGAIN)
    for name, (dtype, shape) in expected.items():
        if found[name] != (dtype, shape):
            has = f"{found[name][0]} {list(found[name][1])}"
            raise NvlmError(f"{name} in {path} is {has}, expected {dtype} {list(shape)}", hint=_AGAIN)
