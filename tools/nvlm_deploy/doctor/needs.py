"""What a profile, or a repository that was assembled from one, needs of a machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from nvlm_deploy.digest import sha256_of
from nvlm_deploy.errors import NvlmError, faults_of
from nvlm_deploy.fingerprint import Fingerprint, fingerprints_of
from nvlm_deploy.machine.resources import available_memory
from nvlm_deploy.manifest import Manifest, read_manifest
from nvlm_deploy.profile import Profile, load_profile
from nvlm_deploy.sku import TENSORRT_LLM, Sku, load_sku

if TYPE_CHECKING:
    from nvlm_deploy.model.spec import ModelSpec
    from nvlm_deploy.planning.build_steps import StepEstimate

BF16_BYTES = 2


@dataclass(frozen=True)
class Needs:
    """`spec` is None where no model was named; `steps` are those of the build, where there is still one to be done."""

    profile: Profile
    sku: Sku
    spec: ModelSpec | None
    steps: Sequence[StepEstimate] = ()
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
        """What `nvlm build` takes, as `nvlm plan` counts it."""
        from nvlm_deploy.planning.build_steps import most_disk_bytes

        return most_disk_bytes(self.steps)

    @property
    def hungriest(self) -> StepEstimate | None:
        """The step that takes the most host memory."""
        return max(self.steps, key=lambda step: step.host_bytes, default=None)

    @property
    def visual_tokens(self) -> int:
        """Of the longest legal request; 0 where no model was named."""
        if self.spec is None:
            return 0
        from nvlm_deploy.planning.memory import limits_of

        return limits_of(self.spec, self.profile).visual_tokens


def needs_of_profile(profile: Profile, checkpoint: Path | None) -> Needs:
    """For building and serving. Without a checkpoint: of NVLM-D-72B on GPUs, of no model in particular without.

    Raises NvlmError for a profile that cannot be, as `nvlm plan` does.
    """
    from nvlm_deploy.planning.known_models import DEFAULT_SPEC, planned_model
    from nvlm_deploy.planning.plan import make_plan

    sku = load_sku(profile.sku)
    if checkpoint is None and sku.compute_capability is None:
        return Needs(profile, sku, None)
    model = planned_model(checkpoint, None if checkpoint else DEFAULT_SPEC)
    return Needs(profile, sku, model.spec, make_plan(model, profile, available_memory()).steps)


def needs_of_repository(repository: Path) -> Needs:
    """For serving it. Raises NvlmError for a folder that is none, or that does not say its profile."""
    from nvlm_deploy.serving.settings import SPEC_FILE, spec_from_json
    from nvlm_deploy.triton.repository import read_repository

    manifest = read_manifest(repository)
    found = sorted(repository.glob(f"*/*/{SPEC_FILE}"))
    if not found:
        raise NvlmError(f"{repository} holds no {SPEC_FILE}: not a repository of ours", hint="`nvlm build` makes one")
    name = found[0].relative_to(repository).as_posix()
    if manifest.outputs.get(name) != sha256_of(found[0]):
        raise NvlmError(f"{found[0]} is not what was built", hint=f"`nvlm verify {repository}` says what else is not")
    read_repository(repository)
    profile = _profile_of(manifest, repository)
    spec = spec_from_json(found[0].read_bytes())
    fingerprints = fingerprints_of(manifest, str(repository))
    return Needs(profile, load_sku(profile.sku), spec, fingerprints=fingerprints)


def _profile_of(manifest: Manifest, repository: Path) -> Profile:
    """As it was when the repository was built; before manifests said that, as it is now."""
    if manifest.profile is not None:
        try:
            return Profile.model_validate(dict(manifest.profile))
        except ValidationError as problem:
            message = f"{repository}: its profile is of another version of this tool: {faults_of(problem)}"
            raise NvlmError(message, hint="build it again") from None
    name = manifest.settings.get("profile")
    if not isinstance(name, str):
        raise NvlmError(f"{repository} does not say its profile", hint="assemble it again: `nvlm build`")
    return load_profile(name)
