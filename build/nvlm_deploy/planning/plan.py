"""The plan of one profile for one model: does it fit, what does it cost to build, what will clients see."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from nvlm_deploy.checkpoint.trtllm_config import config_from_layout
from nvlm_deploy.checkpoint.trtllm_layout import legal_tensor_parallel
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.llm.engine_arguments import engine_arguments
from nvlm_deploy.model.spec import ModelSpec
from nvlm_deploy.planning.build_steps import Host, StepEstimate, step_estimates
from nvlm_deploy.planning.known_models import PlannedModel
from nvlm_deploy.planning.memory import KV_BYTES, MemoryAccount, limits_of, memory_account, room_of
from nvlm_deploy.planning.roofline import SplitDecoder, encoder_s
from nvlm_deploy.planning.serving import (
    PREPROCESS_S_PER_IMAGE,
    Demand,
    Prediction,
    Workload,
    fewest_tiles,
    images_in,
    predict,
)
from nvlm_deploy.planning.weights import layout_of
from nvlm_deploy.profile import Profile
from nvlm_deploy.sku import ONNX_RUNTIME, REFERENCE, Sku, load_sku
from nvlm_deploy.vision.tensorrt import require_target as require_vision_target


@dataclass(frozen=True)
class Plan:
    """What is known of a profile before anything is built."""

    model: PlannedModel
    profile: Profile
    sku: Sku
    workload: Workload
    memory: MemoryAccount
    host: Host = field(default_factory=Host)

    @property
    def gpus(self) -> int:
        """GPUs it takes; 0 without any."""
        if self.sku.compute_capability is None:
            return 0
        if self.profile.decoder.runtime == REFERENCE:
            return 1
        return self.profile.decoder.tensor_parallel * self.profile.decoder.pipeline_parallel

    @property
    def price_usd_per_hour(self) -> float | None:
        price = self.sku.price_usd_per_hour
        return None if price is None else price * self.gpus

    @cached_property
    def steps(self) -> tuple[StepEstimate, ...]:
        return step_estimates(self.model, self.profile, self.host)

    @property
    def requests(self) -> int:
        """How many requests of this workload are served at once."""
        return self.memory.requests(self.workload.sequence_tokens(self.model.spec))

    @property
    def servable_images(self) -> tuple[int, int]:
        """Images of one request that max_seq_len has room for: of as many tiles as may be, and of as few."""
        spec, longest = self.model.spec, self.profile.decoder.max_seq_len
        most, fewest = spec.tiling.max_tiles_with_thumbnail, fewest_tiles(spec)
        return images_in(longest, spec, most), images_in(longest, spec, fewest)

    @property
    def warning(self) -> str | None:
        """What the profile promises and no request can have, with the number that works; None where it keeps all."""
        promised, longest = self.profile.serving.max_images, self.profile.decoder.max_seq_len
        large, small = self.servable_images
        if promised <= small:
            return None
        tiles = self.model.spec.tiling.max_tiles_with_thumbnail
        return (
            f"max_images {promised:,} cannot be served: max_seq_len {longest:,} has room for {small:,} of "
            f"{fewest_tiles(self.model.spec)} tile, {large:,} of {tiles}"
        )

    @cached_property
    def refused_request(self) -> str | None:
        """Why a request of this workload would be refused, or None."""
        tokens, longest = self.workload.sequence_tokens(self.model.spec), self.profile.decoder.max_seq_len
        if self.workload.images > self.profile.serving.max_images:
            return f"{self.workload.images:,} images, max_images is {self.profile.serving.max_images:,}"
        if tokens > longest:
            return f"{tokens:,} tokens with the answer, max_seq_len is {longest:,}"
        return None

    @property
    def serves(self) -> bool:
        """Whether it fits and would answer this workload's requests."""
        return self.memory.fits and self.refused_request is None

    @cached_property
    def prediction(self) -> Prediction | None:
        """None where the model does not fit, the request would be refused, or no speed is stated for the SKU."""
        if not self.serves or self.why_no_prediction:
            return None
        spec, workload = self.model.spec, self.workload
        demand = Demand(
            preprocess_s=PREPROCESS_S_PER_IMAGE * workload.images,
            vision_s=encoder_s(spec, self.sku, workload.tiles(spec), self.profile.vision.precision),
            prompt_tokens=workload.prompt_tokens(spec),
            output_tokens=workload.output_tokens,
            concurrency=workload.concurrency,
            most_running=self.requests,
        )
        return predict(self._decoder(), demand)

    @property
    def why_no_prediction(self) -> str | None:
        if self.sku.bandwidth_gb_s is None:
            return f"SKU {self.sku.name!r} states no speed"
        if self.profile.decoder.runtime == REFERENCE:
            return "the reference decoder is there for its answers, not for its speed"
        return None

    def _decoder(self) -> SplitDecoder:
        choice = self.profile.decoder
        return SplitDecoder(
            self.model.spec.decoder,
            self.sku,
            choice.tensor_parallel,
            choice.pipeline_parallel,
            2 if choice.quantization == "none" else 1,
            KV_BYTES[choice.kv_cache],
        )


def make_plan(model: PlannedModel, profile: Profile, host_bytes: int, workload: Workload | None = None) -> Plan:
    """`host_bytes` are this machine's free memory, which a profile without GPUs has.

    Raises NvlmError for what cannot be whatever the memory: a split that the model or one server does not allow, naming
    the legal ones, a type or a runtime that the GPU lacks, lengths beyond the model's or the engine's.
    """
    sku = load_sku(profile.sku)
    _require_runtimes(profile, sku)
    layout = layout_of(model.spec, profile)
    if profile.decoder.runtime != REFERENCE:
        _require_one_server(model.spec, profile, sku)
        engine_arguments(config_from_layout(layout), sku, limits_of(model.spec, profile))
    if profile.vision.runtime != ONNX_RUNTIME:
        require_vision_target(profile.vision.runtime, profile.vision.precision, sku)
    _require_lengths(model.spec, profile)
    account = memory_account(model.spec, profile, room_of(sku, host_bytes))
    return Plan(model, profile, sku, workload or Workload(), account)


def legal_splits(spec: ModelSpec, most_gpus: int) -> list[tuple[int, int]]:
    """(tensor, pipeline) that the model allows on so many GPUs of one server, by GPUs."""
    splits = [
        (tensor, pipeline)
        for tensor in legal_tensor_parallel(spec.decoder)
        for pipeline in range(1, spec.decoder.layers + 1)
        if tensor * pipeline <= most_gpus
    ]
    return sorted(splits, key=lambda split: (split[0] * split[1], split[1]))


def _require_runtimes(profile: Profile, sku: Sku) -> None:
    for section, runtime in (("vision", profile.vision.runtime), ("decoder", profile.decoder.runtime)):
        if runtime not in sku.runtimes:
            raise NvlmError(
                f"{section}.runtime {runtime!r} does not exist on {sku.name}", hint=f"it has {', '.join(sku.runtimes)}"
            )


def _require_one_server(spec: ModelSpec, profile: Profile, sku: Sku) -> None:
    most, choice = sku.gpus_per_server or 1, profile.decoder
    gpus = choice.tensor_parallel * choice.pipeline_parallel
    if gpus > most:
        legal = ", ".join(f"{tensor} x {pipeline}" for tensor, pipeline in legal_splits(spec, most))
        raise NvlmError(
            f"tensor_parallel {choice.tensor_parallel} x pipeline_parallel {choice.pipeline_parallel} are {gpus} GPUs, "
            f"a server has {most} of {sku.name}",
            hint=f"legal: {legal}",
        )


def _require_lengths(spec: ModelSpec, profile: Profile) -> None:
    longest, positions = profile.decoder.max_seq_len, spec.decoder.max_positions
    if longest > positions:
        raise NvlmError(
            f"profile {profile.name!r}: max_seq_len {longest}, the model has {positions} positions",
            hint=f"max_seq_len = {positions} at most",
        )
