"""What a profile, or a repository that was assembled from one, needs of a machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from nvlm_deploy.artifacts import Manifest, read_manifest
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.fingerprint import Fingerprint, fingerprints_of
from nvlm_deploy.profile import Profile, load_profile
from nvlm_deploy.sku import Sku, load_sku

if TYPE_CHECKING:
    from nvlm_deploy.model.spec import ModelSpec

TENSORRT_LLM = "tensorrt_llm"
BF16_BYTES = 2


@dataclass(frozen=True)
class Needs:
    """`spec` is None where no model was named; `builds` says whether engines are still to be made here."""

    profile: Profile
    sku: Sku
    spec: ModelSpec | None
    builds: bool
    fingerprints: Mapping[str, Fingerprint] = field(default_factory=dict)

    @property
    def has_gpu(self) -> bool:
        return self.sku.compute_capability is not None

    @property
    def gpus(self) -> int:
        decoder = self.profile.decoder
        return decoder.tensor_parallel * decoder.pipeline_parallel if self.has_gpu else 0

    @property
    def runtimes(self) -> frozenset[str]:
        return frozenset((self.profile.vision.runtime, self.profile.decoder.runtime))

    @property
    def in_container(self) -> bool:
        """Whether Triton is that of a TensorRT-LLM container, not the one that comes with nvidia-pytriton."""
        return TENSORRT_LLM in self.runtimes

    @property
    def disk_bytes(self) -> int:
        """All that `nvlm build` writes: graph, vision engine, its copy in the repository, ranks, their engines."""
        if self.spec is None or not self.builds:
            return 0
        from nvlm_deploy.planning.weights import decoder_bytes, layout_of, vision_engine_bytes

        layout = layout_of(self.spec, self.profile)
        ranks = sum(decoder_bytes(layout, rank).total for rank in range(layout.parallelism.world_size))
        copies = 2 if self.in_container else 1
        return 3 * vision_engine_bytes(self.spec, self.profile.vision.precision) + copies * ranks

    @property
    def shared_memory_bytes(self) -> int:
        """Tiles and prompt table of the longest legal request: one model's process hands them to the next there."""
        if self.spec is None:
            return 0
        from nvlm_deploy.planning.memory import limits_of

        tokens = limits_of(self.spec, self.profile).visual_tokens
        tiles = tokens // self.spec.tiling.tokens_per_tile
        table = tokens * self.spec.decoder.hidden_size * BF16_BYTES
        return tiles * self.spec.tiling.tile_size**2 * 3 + table


def needs_of_profile(profile: Profile, checkpoint: Path | None) -> Needs:
    """For building and serving. Without a checkpoint: of NVLM-D-72B on GPUs, of no model in particular without."""
    from nvlm_deploy.planning.known_models import DEFAULT_SPEC, planned_model

    sku = load_sku(profile.sku)
    if checkpoint is None and sku.compute_capability is None:
        return Needs(profile, sku, None, builds=True)
    model = planned_model(checkpoint, None if checkpoint else DEFAULT_SPEC)
    return Needs(profile, sku, model.spec, builds=True)


def needs_of_repository(repository: Path) -> Needs:
    """For serving it. Raises NvlmError for a folder that is none, or that does not say its profile."""
    from nvlm_deploy.serving.settings import SPEC_FILE, spec_from_json

    manifest = read_manifest(repository)
    found = sorted(repository.glob(f"*/*/{SPEC_FILE}"))
    if not found:
        raise NvlmError(f"{repository} holds no {SPEC_FILE}: not a repository of ours", hint="`nvlm build` makes one")
    profile = _profile_of(manifest, repository)
    spec = spec_from_json(found[0].read_text(encoding="utf-8"))
    fingerprints = fingerprints_of(manifest, str(repository))
    return Needs(profile, load_sku(profile.sku), spec, builds=False, fingerprints=fingerprints)


def _profile_of(manifest: Manifest, repository: Path) -> Profile:
    """As it was when the repository was built; before manifests said that, as it is now."""
    if manifest.profile is not None:
        try:
            return Profile.model_validate(dict(manifest.profile))
        except ValueError as problem:
            raise NvlmError(f"{repository}: its profile is of another version of this tool: {problem}") from None
    name = manifest.settings.get("profile")
    if not isinstance(name, str):
        raise NvlmError(f"{repository} does not say its profile", hint="assemble it again: `nvlm build`")
    return load_profile(name)
