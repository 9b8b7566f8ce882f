"""Read a sharded safetensors checkpoint by tensor name; what is missing is said before anything is loaded."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.model.ends import GENERATION_NAME
from nvlm_deploy.places import require_folder

if TYPE_CHECKING:
    import torch

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
TOKENIZER_NAME = "tokenizer.json"
# the format's own limit on a header (safetensors: MAX_HEADER_SIZE)
_MAX_HEADER_BYTES = 100_000_000
# MLX keeps torch's layout; transformers reads both alike
_FORMATS = ("pt", "mlx")
_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies, from its shard's header. `dtype` is safetensors' name, as `BF16`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: Path
    size_bytes: int
    offset: int


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose shards are all there and whole, by their headers."""

    folder: Path
    config: Mapping[str, Any]
    infos: Mapping[str, TensorInfo] = field(repr=False)
    generation: Mapping[str, Any] = field(default_factory=dict, repr=False, kw_only=True)

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read config.json, generation_config.json where there is one, the index and every shard's header.

        Raises NvlmError naming each missing shard, a shard shorter than its header says, and each tensor of the index
        that its shard does not hold.
        """
        require_folder(folder, "checkpoint folder")
        config = read_json(folder / "config.json")
        index = _tensor_to_shard(folder)
        shards = sorted(set(index.values())) if index is not None else [SINGLE_NAME]
        _require_files(folder, shards)
        infos = {info.name: info for shard in shards for info in read_header(folder / shard)}
        if index is not None:
            _require_tensors(folder, index, infos)
        return cls(folder, config, infos, generation=optional_json(folder / GENERATION_NAME) or {})

    def added_token_id(self, content: str) -> int | None:
        """The id that tokenizer.json gives an added token such as `<|im_end|>`; None where it has none."""
        added = (optional_json(self.folder / TOKENIZER_NAME) or {}).get("added_tokens")
        tokens = [token for token in added if isinstance(token, dict)] if isinstance(added, list) else []
        ids = (token.get("id") for token in tokens if token.get("content") == content)
        return next((token for token in ids if isinstance(token, int)), None)

    @property
    def names(self) -> list[str]:
        return list(self.infos)

    @property
    def shards(self) -> list[Path]:
        return sorted({info.shard for info in self.infos.values()})

    @property
    def shard_states(self) -> list[tuple[str, int, int]]:
        """Name, size and time of change of each shard: a killed run goes on only where they are the same."""
        states = [(shard.name, shard.stat()) for shard in self.shards]
        return [(name, state.st_size, state.st_mtime_ns) for name, state in states]

    @cached_property
    def size_bytes(self) -> int:
        return sum(info.size_bytes for info in self.infos.values())

    def info(self, name: str) -> TensorInfo:
        """Raises NvlmError when the checkpoint has no such tensor."""
        if name not in self.infos:
            raise NvlmError(f"{self.folder} has no tensor {name!r}", hint=f"`nvlm inspect {self.folder}` lists it")
        return self.infos[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.info(name).shape

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, as stored."""
        from safetensors import safe_open

        with safe_open(self.info(name).shard, framework="pt") as shard:
            tensor: torch.Tensor = shard.get_tensor(name)
        return tensor

    def chunks(self, name: str, *, rows: Sequence[range] | None = None) -> Iterator[torch.Tensor]:
        """The tensor's rows (its first axis) in order, or some ranges of them, as stored and a few MB at a time.

        Reads the shard, does not map it: mapped pages count as memory of the process until the tensor is gone. Nor does
        the page cache keep a tensor of several chunks: finding pages for it was seen to take longer than the reading.
        """
        info = self.info(name)
        row_bytes = info.size_bytes // max(1, info.shape[0] if info.shape else 1)
        step = max(1, _CHUNK_BYTES // max(1, row_bytes))
        with info.shard.open("rb") as file:
            for part in [range(info.shape[0] if info.shape else 1)] if rows is None else rows:
                for start in range(part.start, part.stop, step):
                    yield _read_rows(file, info, start, min(start + step, part.stop), row_bytes)

    def tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        """All tensors below a prefix, which is stripped."""
        return {name.removeprefix(prefix): self.tensor(name) for name in self.names if name.startswith(prefix)}


def _read_rows(file: BinaryIO, info: TensorInfo, start: int, stop: int, row_bytes: int) -> torch.Tensor:
    import torch

    data = torch.empty((stop - start) * row_bytes, dtype=torch.uint8)
    file.seek(info.offset + start * row_bytes)
    if file.readinto(data.numpy().data) != len(data):  # type: ignore[attr-defined]
        raise _truncated(info.shard, info.shard.stat().st_size, info.offset + info.size_bytes)
    if info.size_bytes > _CHUNK_BYTES:
        os.posix_fadvise(file.fileno(), info.offset + start * row_bytes, len(data), os.POSIX_FADV_DONTNEED)
    rows = data.view(_torch_dtype(info))
    return rows.reshape(stop - start, *info.shape[1:]) if info.shape else rows.reshape(())


def _torch_dtype(info: TensorInfo) -> torch.dtype:
    import torch

    dtypes = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    if info.dtype not in dtypes:
        raise NvlmError(f"tensor {info.name} in {info.shard.name} is {info.dtype}, expected {', '.join(dtypes)}")
    return dtypes[info.dtype]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; NvlmError when it is missing or not one."""
    if not path.is_file():
        raise NvlmError(f"no file {path.name} in {path.parent}", hint=f"fetch {path.name} again")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as problem:
        raise NvlmError(f"{path} is not JSON: {problem}", hint=f"fetch {path.name} again") from problem
    if not isinstance(document, dict):
        raise NvlmError(f"{path} holds a JSON {type(document).__name__}, expected an object")
    return document


def optional_json(path: Path) -> dict[str, Any] | None:
    """As `read_json`; None for a file that is not there."""
    return read_json(path) if path.exists() else None


def read_header(shard: Path) -> list[TensorInfo]:
    """The tensors of one safetensors file, from its header alone.

    Raises NvlmError when the file is shorter or longer than its header says, or no safetensors file at all.
    """
    file_size = shard.stat().st_size
    with shard.open("rb") as file:
        prefix = file.read(8)
        if prefix == b"version ":
            raise NvlmError(f"shard {shard.name} in {shard.parent} is a Git LFS pointer", hint="run `git lfs pull`")
        if len(prefix) < 8:
            raise _truncated(shard, file_size, 8)
        header_size = struct.unpack("<Q", prefix)[0]
        header = file.read(min(header_size, _MAX_HEADER_BYTES))
    if header_size > _MAX_HEADER_BYTES or (len(header) < header_size and not header.startswith(b"{")):
        raise _foreign(shard)
    if len(header) < header_size:
        raise _truncated(shard, file_size, header_size + 8)
    infos = _infos(header, shard)
    end = 8 + header_size + max((info.offset + info.size_bytes for info in infos), default=0)
    if file_size != end:
        raise _truncated(shard, file_size, end)
    _require_valid(shard)
    return [replace(info, offset=8 + header_size + info.offset) for info in infos]


def _infos(header: bytes, shard: Path) -> list[TensorInfo]:
    """Offsets are counted from the end of the header."""
    try:
        entries = json.loads(header)
        _require_layout_of_torch(entries.pop("__metadata__", None), shard)
        return [_info(name, entry, shard) for name, entry in entries.items()]
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as problem:
        raise _damaged(shard, problem) from problem


def _require_layout_of_torch(metadata: Any, shard: Path) -> None:
    """Weights of TensorFlow and Flax have their axes in another order; transformers converts them, we do not."""
    written = metadata.get("format", _FORMATS[0]) if isinstance(metadata, dict) else _FORMATS[0]
    if written not in _FORMATS:
        raise NvlmError(
            f"shard {shard.name} in {shard.parent}: its metadata says format {written!r}, expected {_FORMATS[0]!r}",
            hint="save the checkpoint again with transformers and torch: `model.save_pretrained(FOLDER)`",
        )


def _info(name: str, entry: Mapping[str, Any], shard: Path) -> TensorInfo:
    begin, end = entry["data_offsets"]
    return TensorInfo(name, str(entry["dtype"]), tuple(entry["shape"]), shard, end - begin, begin)


def _require_valid(shard: Path) -> None:
    """The library's own validation: shapes that match their bytes, no overlaps, no gaps."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(shard, framework="np"):
            pass
    except SafetensorError as problem:
        raise _damaged(shard, problem) from problem


def _damaged(shard: Path, problem: Exception) -> NvlmError:
    return NvlmError(f"shard {shard.name} in {shard.parent} has a damaged header: {problem}", hint="fetch it again")


def _foreign(shard: Path) -> NvlmError:
    return NvlmError(
        f"shard {shard.name} in {shard.parent} is not a safetensors file", hint=f"fetch {shard.name} again"
    )


def _truncated(shard: Path, found: int, expected: int) -> NvlmError:
    state = "truncated" if found < expected else "longer than its header says"
    return NvlmError(
        f"shard {shard.name} in {shard.parent} is {state}: {found:,} bytes, expected {expected:,}",
        hint=f"fetch {shard.name} again",
    )


def _tensor_to_shard(folder: Path) -> dict[str, str] | None:
    """The index, or None for a single-file checkpoint."""
    if not (folder / INDEX_NAME).is_file():
        if (folder / SINGLE_NAME).is_file():
            return None
        raise NvlmError(
            f"no {INDEX_NAME} in {folder}", hint="fetch the safetensors files (pytorch_model-*.bin are never unpickled)"
        )
    weight_map = read_json(folder / INDEX_NAME).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise NvlmError(f"{folder / INDEX_NAME} has no weight_map", hint=f"fetch {INDEX_NAME} again")
    return {str(name): str(shard) for name, shard in weight_map.items()}


def _require_files(folder: Path, shards: Iterable[str]) -> None:
    """A shard name comes from a file a stranger wrote: it may not lead out of the folder."""
    shards = list(shards)
    outside = [shard for shard in shards if Path(shard).name != shard]
    if outside:
        raise NvlmError(f"{INDEX_NAME} names a shard outside the folder: {outside[0]}")
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        listed = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise NvlmError(
            f"{len(missing)} of {len(shards)} shards missing in {folder}: {listed}",
            hint=f"fetch the missing files{_and_tokenizer(folder)}, then `nvlm inspect {folder}`",
        )


def _and_tokenizer(folder: Path) -> str:
    return "" if (folder / TOKENIZER_NAME).is_file() else f" and {TOKENIZER_NAME}, which is missing too"


def _require_tensors(folder: Path, index: Mapping[str, str], infos: Mapping[str, TensorInfo]) -> None:
    missing = [name for name, shard in index.items() if name not in infos or infos[name].shard.name != shard]
    if missing:
        raise NvlmError(
            f"{len(missing)} tensor(s) of the index are not in their shard, first {missing[0]} "
            f"({index[missing[0]]} in {folder})",
            hint=f"fetch {index[missing[0]]} and {INDEX_NAME} again: they are of different versions",
        )
