"""What a plan is made for: a checkpoint folder, of which config.json and the index suffice, or a built-in spec."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from nvlm_deploy.checkpoint.reader import INDEX_NAME, read_json
from nvlm_deploy.errors import NvlmError, unknown_name
from nvlm_deploy.model.inventory import PARTS, expected_tensors
from nvlm_deploy.model.released import NVLM_D_72B
from nvlm_deploy.model.spec import MOST_HEADS, ModelSpec, VisionSpec, spec_from_config
from nvlm_deploy.places import require_folder

KNOWN_SPECS: Mapping[str, Mapping[str, Any]] = {"nvlm-d-72b": NVLM_D_72B}
DEFAULT_SPEC = "nvlm-d-72b"
BF16_BYTES = 2


@dataclass(frozen=True)
class PlannedModel:
    """A model by its shapes. `evidence` is of the shapes: published, or measured when a folder states them."""

    name: str
    spec: ModelSpec
    evidence: str

    @cached_property
    def parameters_by_part(self) -> dict[str, int]:
        """Parameters of vision_model, projector and language_model, dummy heads included."""
        shapes = expected_tensors(self.spec)
        return {
            part: sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(prefix))
            for part, prefix in PARTS.items()
        }

    @property
    def parameters(self) -> int:
        return sum(self.parameters_by_part.values())

    @property
    def checkpoint_bytes(self) -> int:
        """All of it in BF16, as the release is."""
        return BF16_BYTES * self.parameters


def planned_model(checkpoint: Path | None = None, spec_name: str | None = None) -> PlannedModel:
    """The model of a folder or of a built-in spec. Raises NvlmError for neither, both, an unknown name, a wrong folder.

    Of a folder config.json and, where there is one, the index are read: no shard needs to be there.
    """
    if checkpoint is not None and spec_name is not None:
        raise NvlmError(f"both a checkpoint ({checkpoint}) and --spec {spec_name}", hint="give one of them")
    if checkpoint is not None:
        return _of_folder(checkpoint)
    if spec_name is None:
        raise NvlmError("nothing to plan for", hint=f"a checkpoint folder, or --spec {DEFAULT_SPEC}")
    if spec_name not in KNOWN_SPECS:
        raise unknown_name("built-in spec", spec_name, sorted(KNOWN_SPECS))
    return PlannedModel(spec_name, spec_from_config(KNOWN_SPECS[spec_name]), "published")


def _of_folder(folder: Path) -> PlannedModel:
    hint = f"config.json suffices, or --spec {DEFAULT_SPEC}"
    if str(folder) in KNOWN_SPECS and not folder.exists():
        raise NvlmError(f"no checkpoint folder {folder} (a built-in spec is named by --spec {folder})", hint=hint)
    require_folder(folder, "checkpoint folder", hint=hint)
    spec = spec_from_config(read_json(folder / "config.json"))
    if (folder / INDEX_NAME).is_file():
        spec = _spec_of_index(spec, read_json(folder / INDEX_NAME), folder / INDEX_NAME)
    return PlannedModel(folder.resolve().name, spec, "measured")


def _spec_of_index(spec: ModelSpec, index: Mapping[str, Any], path: Path) -> ModelSpec:
    """The spec with as many dummy heads as the index's total size asks for; config.json does not count them.

    Raises NvlmError for an index that lacks a tensor of the model, or whose size no number of heads explains.
    """
    weight_map, metadata = index.get("weight_map"), index.get("metadata")
    if not isinstance(weight_map, dict):
        raise NvlmError(f"{path} has no weight_map", hint=f"fetch {INDEX_NAME} again")
    missing = [name for name in expected_tensors(spec) if name not in weight_map]
    if missing:
        raise NvlmError(
            f"{path} lacks {len(missing)} tensors of the model, first {missing[0]}",
            hint="fetch config.json and the index again: they are not of one model",
        )
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if not isinstance(total, int):
        return spec
    unpadded = replace(spec, vision=replace(spec.vision, padded_heads=spec.vision.heads))
    least = BF16_BYTES * sum(math.prod(shape) for shape in expected_tensors(unpadded).values())
    heads, rest = divmod(total - least, BF16_BYTES * _parameters_of_a_head(spec.vision))
    if rest or not 0 <= heads <= MOST_HEADS:
        raise NvlmError(
            f"{path} counts {total:,} bytes; config.json's shapes take {least:,} in BF16, and dummy heads do not "
            "explain the difference",
            hint="plan for the unquantised BF16 checkpoint, or leave the index out to plan by config.json alone",
        )
    return replace(spec, vision=replace(spec.vision, padded_heads=spec.vision.heads + heads))


def _parameters_of_a_head(vision: VisionSpec) -> int:
    """Rows of q, k, v, of their two norms and columns of the output projection, in every block."""
    return vision.layers * vision.head_size * (4 * vision.hidden_size + 2)
