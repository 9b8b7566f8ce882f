"""The whole of NVLM-D as a Hugging Face folder with its decoder in FP8 or BF16, for engines that know NVLM-D: vLLM.

Written from the same calibration as the TensorRT-LLM checkpoint and with the same scales and codes. Tensors are read,
quantised and written a few MB at a time by a thread for each core; after a kill the same call goes on.
"""

from __future__ import annotations

import filecmp
import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from nvlm_deploy.artifacts import resumable_folder, write_text
from nvlm_deploy.checkpoint.hf_layout import (
    INPUT_SCALE,
    KEY_SCALE,
    MAX_SHARD_BYTES,
    QUANT_CONFIG_NAME,
    VALUE_SCALE,
    WEIGHT_SCALE,
    HfLayout,
    HfTensor,
    HfUnit,
    require_layout,
)
from nvlm_deploy.checkpoint.hf_source import CONFIG_NAME, companions_of, layout_for
from nvlm_deploy.checkpoint.reader import INDEX_NAME, TOKENIZER_NAME, Checkpoint
from nvlm_deploy.checkpoint.resumable import TensorFiles, in_threads, tensor_files
from nvlm_deploy.checkpoint.soundness import SoundChunks
from nvlm_deploy.checkpoint.trtllm_layout import FP8, Layout
from nvlm_deploy.digest import sha256_of
from nvlm_deploy.errors import MachineError, NvlmError
from nvlm_deploy.llm.calibrate import CalibrationResult
from nvlm_deploy.llm.quantize import (
    LEAST_KV_CACHE_SCALE,
    codes_and_row_scales,
    given_up,
    linear_chunks,
    linear_scales,
    require_calibrated,
)
from nvlm_deploy.llm.threads import one_torch_thread_each
from nvlm_deploy.llm.trtllm import BY_CALIBRATION
from nvlm_deploy.manifest import sha256_of_json
from nvlm_deploy.model.decoder import PREFIX
from nvlm_deploy.model.fp8 import scale_from_amax, to_e4m3
from nvlm_deploy.model.spec import ModelSpec
from nvlm_deploy.model.tokenizer import text_without_leftovers
from nvlm_deploy.progress import Progress, silent

log = logging.getLogger(__name__)

_TOKENIZERS = ((TOKENIZER_NAME,), ("vocab.json", "merges.txt"))


def hf_checkpoint_from(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    output: Path,
    *,
    calibration: CalibrationResult | None,
    quant_algo: str | None = BY_CALIBRATION,
    kv_cache_quant_algo: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    force: bool = False,
    on_progress: Progress = silent,
) -> Checkpoint:
    """Write the folder `output`, whole or not at all; return it opened. See `HfExport`.

    A folder that is there already is replaced with `force` only, the checkpoint's own never: NvlmError.
    """
    if quant_algo == BY_CALIBRATION:
        quant_algo = None if calibration is None else FP8
    _require_free(output, checkpoint.folder, force=force)
    layout = layout_for(checkpoint, spec, quant_algo, kv_cache_quant_algo, max_shard_bytes=max_shard_bytes)
    export = HfExport(checkpoint, layout, calibration)
    export.require_sources()
    with resumable_folder(output, export.identity) as folder:
        export.write(folder, on_progress)
    return Checkpoint.open(output)


@dataclass(frozen=True)
class HfExport:
    """One checkpoint in one layout.

    FP8 scales are shared by q, k, v and by gate, up, unlike in ModelOpt's folders: every engine fuses these linears and
    requantises with the larger scale, which changes nothing where they are equal (contract D.3). An FP8 KV cache has a
    scale each for keys and values, amax / 448, not raised to 1 as in a TensorRT-LLM checkpoint (contract D.2).

    Without a calibration ("data-free") there is BF16 and FP8_PER_CHANNEL_PER_TOKEN, its FP8 KV cache with scale 1; what
    that gives up is in `notes` and logged as a warning.
    """

    checkpoint: Checkpoint
    layout: HfLayout
    calibration: CalibrationResult | None = None

    @cached_property
    def identity(self) -> str:
        """What an interrupted export may be resumed for: this checkpoint, unchanged, this layout, these scales."""
        amax = None if self.calibration is None else sorted(self.calibration.amax.items())
        files = [(path.name, sha256_of(path)) for path in self.companions]
        layout = [asdict(self.layout.spec), self.layout.shards, self.layout.quant_config]
        source = [str(self.checkpoint.folder), self.checkpoint.shard_states, dict(self.checkpoint.config)]
        return sha256_of_json([*source, files, layout, amax])

    @property
    def notes(self) -> dict[str, Any]:
        """For the manifest: where the scales come from, or what it costs that there is no calibration."""
        if self.calibration is not None:
            return {"calibration": {"samples": self.calibration.samples, "tokens": self.calibration.tokens}}
        losses = given_up(self.layout.quant_algo, self.layout.kv_cache_quant_algo)
        return {"data-free": losses} if losses else {}

    @cached_property
    def companions(self) -> list[Path]:
        """The files of the source that lie beside its weights."""
        return companions_of(self.checkpoint.folder)

    def require_sources(self) -> None:
        """Nothing is written for files that are missing or for a calibration that lacks something.

        Tensors were judged by `layout_for`.
        """
        layout = self.layout
        require_calibrated(
            Layout(layout.spec.decoder, layout.quant_algo, kv_cache_quant_algo=layout.kv_cache_quant_algo),
            self.calibration,
        )
        self._require_files()

    def write(self, folder: Path, on_progress: Progress = silent) -> None:
        """Fill a folder, which may hold what a killed run of the same identity left; all of it is read back.

        Raises NvlmError for weights that are not finite, all zero or not those that were calibrated, MachineError for
        a disk that gives back other bytes.
        """
        self.require_sources()
        for loss in self.notes.get("data-free", []):
            log.warning("data-free: %s", loss)
        with tensor_files(folder, self.layout.shards, identity=self.identity, on_progress=on_progress) as files:
            # first, or running out of disk here would cost all that is written already
            self._write_documents(folder)
            writer = _Writer(files, self.layout)
            units = [unit for unit in self.layout.units if not writer.is_finished(unit)]
            with one_torch_thread_each():
                in_threads(lambda unit: self._write(unit, writer), units)
        require_written(folder, self.layout)

    def _write(self, unit: HfUnit, writer: _Writer) -> None:
        name = unit.tensor.name.removeprefix(PREFIX)
        if not unit.is_quantised:
            chunks = iter(SoundChunks(unit.tensor.name, self.checkpoint.chunks(unit.tensor.name)))
            as_bf16 = (chunk.to(torch.bfloat16) for chunk in chunks)
            writer.put_chunks(unit.tensor, as_bf16 if unit.is_of_decoder else chunks)
        elif self.layout.quant_algo == FP8:
            self._write_per_tensor(unit, name, writer)
        else:
            self._write_per_channel(unit, name, writer)
        self._write_cache_scales(unit, name, writer)

    def _write_per_tensor(self, unit: HfUnit, name: str, writer: _Writer) -> None:
        scales = linear_scales(name.removesuffix(".weight"), self.calibration)
        chunks = linear_chunks(self.checkpoint, name, self.calibration)
        writer.put_chunks(unit.tensor, (to_e4m3(chunk, scales.weight) for chunk in chunks))
        writer.put_chunks(unit.scales[WEIGHT_SCALE], [scales.weight])
        writer.put_chunks(unit.scales[INPUT_SCALE], [scales.activation])

    def _write_per_channel(self, unit: HfUnit, name: str, writer: _Writer) -> None:
        row_scales = []

        def codes() -> Iterator[torch.Tensor]:
            for chunk in linear_chunks(self.checkpoint, name, self.calibration):
                values, scales = codes_and_row_scales(chunk)
                row_scales.append(scales)
                yield values

        writer.put_chunks(unit.tensor, codes())
        writer.put_chunks(unit.scales[WEIGHT_SCALE], row_scales)

    def _write_cache_scales(self, unit: HfUnit, name: str, writer: _Writer) -> None:
        layer = name.rpartition(".self_attn.")[0]
        for kind, which in ((KEY_SCALE, "keys"), (VALUE_SCALE, "values")):
            if kind in unit.scales:
                writer.put_chunks(unit.scales[kind], [self._cache_scale(f"{layer}.self_attn.{which}")])

    def _cache_scale(self, name: str) -> torch.Tensor:
        """float32 [1]."""
        if self.calibration is None:
            return torch.tensor([LEAST_KV_CACHE_SCALE])
        return scale_from_amax(torch.tensor([self.calibration.amax[name]]))

    def _write_documents(self, folder: Path) -> None:
        """All but the weights."""
        for path in self.companions:
            neutral = text_without_leftovers(path) if path.name == TOKENIZER_NAME else None
            if neutral is not None:  # engines obey what training left over
                write_text(folder / path.name, neutral)
                continue
            shutil.copyfile(path, folder / path.name)
            if not filecmp.cmp(path, folder / path.name, shallow=False):
                raise MachineError(f"{path.name} read back from {folder} differs", hint="check the disk")
        documents = {
            INDEX_NAME: self.layout.index,
            QUANT_CONFIG_NAME: self.layout.quant_config,
            CONFIG_NAME: _config(self.checkpoint, self.layout),
        }
        for name, document in documents.items():
            if document is not None:
                write_text(folder / name, json.dumps(document, indent=2) + "\n")

    def _require_files(self) -> None:
        """Raises NvlmError for a folder that no engine could load: no tokenizer, or no class for its config.json."""
        found = {path.name for path in self.companions}
        if not any(found.issuperset(names) for names in _TOKENIZERS):
            raise NvlmError(
                f"no tokenizer in {self.checkpoint.folder}: neither tokenizer.json nor vocab.json and merges.txt",
                hint="fetch the tokenizer files as well",
            )
        auto_map = self.checkpoint.config.get("auto_map")
        reference = auto_map.get("AutoConfig") if isinstance(auto_map, dict) else None
        module = f"{str(reference).split('.')[0]}.py"
        # `owner/repository--module.Class` is fetched by who loads the folder
        if reference is not None and "--" not in str(reference) and module not in found:
            raise NvlmError(
                f"no {module} in {self.checkpoint.folder}: config.json names it as the class of its configuration",
                hint=f"fetch {module} as well",
            )


@dataclass(frozen=True)
class _Writer:
    """Shards being filled, addressed by tensor."""

    files: TensorFiles
    layout: HfLayout

    @cached_property
    def shard_of(self) -> dict[str, str]:
        return {name: shard for shard, tensors in self.layout.shards.items() for name in tensors}

    def is_finished(self, unit: HfUnit) -> bool:
        return all(self.files.is_finished(self.shard_of[tensor.name], tensor.name) for tensor in unit.tensors)

    def put_chunks(self, tensor: HfTensor, chunks: Iterator[torch.Tensor] | list[torch.Tensor]) -> None:
        """Rows in order; whole when they end."""
        with self.files.tensor(self.shard_of[tensor.name], tensor.name) as file:
            for chunk in chunks:
                file.append(chunk)


def require_written(folder: Path, layout: HfLayout) -> None:
    """Raises NvlmError when a folder, by its index, config.json and every shard's header, is not of the layout."""
    written = Checkpoint.open(folder)
    require_layout({name: (info.dtype, info.shape) for name, info in written.infos.items()}, layout)
    if written.config.get("quantization_config") != layout.quantization_config:
        raise NvlmError(f"{folder / CONFIG_NAME} has another quantization_config than the weights were written for")


def _config(checkpoint: Checkpoint, layout: HfLayout) -> dict[str, object]:
    quantization = layout.quantization_config
    return {**checkpoint.config, **({} if quantization is None else {"quantization_config": quantization})}


def _require_free(output: Path, source: Path, *, force: bool) -> None:
    """The folder is swapped into place: what stood there would be gone."""
    here, there = output.resolve(), source.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise NvlmError(f"{output} and the checkpoint {source} must not hold one another", hint="choose another folder")
    if output.exists() and not force and (not output.is_dir() or any(output.iterdir())):
        raise NvlmError(f"{output} exists and is not empty", hint="choose another folder, or --force to replace it")
