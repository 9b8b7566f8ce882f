"""What a Hugging Face folder is made of: the layout of a checkpoint, and the files beside its weights. No torch."""

from __future__ import annotations

import logging
from pathlib import Path

from nvlm_deploy.checkpoint.hf_layout import MAX_SHARD_BYTES, QUANT_CONFIG_NAME, HfLayout
from nvlm_deploy.checkpoint.reader import INDEX_NAME, Checkpoint
from nvlm_deploy.manifest import MANIFEST_NAME
from nvlm_deploy.model.inventory import PARTS, require_tensors
from nvlm_deploy.model.spec import ModelSpec

log = logging.getLogger(__name__)

CONFIG_NAME = "config.json"
# What an engine, a processor or a lawyer reads beside the weights. Weights of any other format are never copied: the
# released repository has all of them twice.
_COMPANION_SUFFIXES = (".json", ".py", ".txt", ".md", ".jinja", ".model", ".tiktoken")
_COMPANION_STEMS = ("LICENSE", "LICENCE", "NOTICE", "COPYING")
_WRITTEN_ANEW = (CONFIG_NAME, INDEX_NAME, QUANT_CONFIG_NAME, MANIFEST_NAME)


def layout_for(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    quant_algo: str | None,
    kv_cache_quant_algo: str | None = None,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> HfLayout:
    """Return the folder that a checkpoint becomes.

    Raises NvlmError for a tensor that is missing, misshapen or quantised already.
    """
    extra = require_tensors(checkpoint, spec)
    if extra:
        log.warning("%d tensor(s) are no part of NVLM-D and left out, first %s", len(extra), extra[0])
    decoder = PARTS["language_model"]
    carried = {name: info.dtype for name, info in checkpoint.infos.items() if not name.startswith(decoder)}
    return HfLayout(spec, carried, quant_algo, kv_cache_quant_algo, max_shard_bytes)


def companions_of(folder: Path) -> list[Path]:
    """Return the tokenizer, processor, configuration and modelling files, model card and licence of a checkpoint."""
    return sorted(path for path in folder.iterdir() if path.is_file() and _is_companion(path.name))


def _is_companion(name: str) -> bool:
    if name in _WRITTEN_ANEW or name.startswith(".") or name.endswith(".index.json"):
        return False
    return name.endswith(_COMPANION_SUFFIXES) or name.split(".")[0].upper() in _COMPANION_STEMS
