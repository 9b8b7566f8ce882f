"""Read and write TensorRT-LLM checkpoints: rank files checked tensor by tensor, split for ranks and merged again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvlm_deploy.artifacts import write_text
from nvlm_deploy.checkpoint.reader import read_header, read_json
from nvlm_deploy.checkpoint.stream import TensorStream, tensor_stream
from nvlm_deploy.checkpoint.trtllm_config import config_from_layout, layout_from_config
from nvlm_deploy.checkpoint.trtllm_layout import Layout, LayoutTensor, rank_file
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.model.spec import DecoderSpec

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
        """`FP8`, or None for BF16 weights."""
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
    if not folder.is_dir():
        raise NvlmError(f"no TensorRT-LLM checkpoint {folder}", hint="build it: `nvlm build`")
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
    """Rank files being filled; `put` shares a tensor among its ranks."""

    layout: Layout
    streams: Sequence[TensorStream]

    def put(self, tensor: LayoutTensor, value: torch.Tensor) -> None:
        """Write the tensor, given without parallelism, to every rank that has a part of it."""
        name = self.layout.name_on_stage(tensor.name)
        for tensor_rank, rank in enumerate(self.layout.ranks_of(tensor.name)):
            parallel = self.layout.parallelism.tensor
            self.streams[rank].put(name, split_tensor(tensor, self.layout.spec, value, tensor_rank, parallel))


@contextmanager
def checkpoint_writer(folder: Path, layout: Layout) -> Iterator[CheckpointWriter]:
    """Fill a folder with config.json and rank files, one tensor in memory at a time; all read back at the end."""
    with ExitStack() as files:
        streams = [
            files.enter_context(tensor_stream(folder / rank_file(rank), layout.rank_tensors(rank)))
            for rank in range(layout.parallelism.world_size)
        ]
        yield CheckpointWriter(layout, streams)
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
