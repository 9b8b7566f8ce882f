"""Recipe: one checkpoint, one profile, and where everything made from them lies."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from nvlm_deploy.checkpoint.reader import Checkpoint
from nvlm_deploy.checkpoint.trtllm_layout import FP8, FP8_PER_CHANNEL, Layout, Parallelism
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.manifest import sha256_of_json
from nvlm_deploy.model.foreign.settings import foreign_settings
from nvlm_deploy.model.inventory import require_tensors
from nvlm_deploy.model.prompt import PromptBuilder
from nvlm_deploy.model.spec import ModelSpec, spec_from_checkpoint
from nvlm_deploy.profile import Profile
from nvlm_deploy.progress import Progress, silent
from nvlm_deploy.samples import SAMPLES_NAME, PlacedSample, Sample, read_placed_samples
from nvlm_deploy.sku import TENSORRT_LLM

TOKENIZER_NAME = "tokenizer.json"
# in the order in which they read one another
STEP_NAMES = (
    "export-vision",
    "build-vision",
    "calibrate-llm",
    "quantize-llm",
    "export-hf",
    "build-llm",
    "assemble",
)
# TensorRT-LLM's names of the profile's choices
QUANT_ALGOS = {"none": None, "fp8": FP8, "fp8_per_channel": FP8_PER_CHANNEL}
KV_CACHE_QUANT_ALGOS = {"16bit": None, "fp8": FP8}


@dataclass(frozen=True)
class Recipe:
    """What is built from what, and where."""

    checkpoint_folder: Path
    profile: Profile
    workspace: Path
    calibration_folder: Path | None = None
    on_progress: Progress = field(default=silent, compare=False)

    @property
    def engines(self) -> Path:
        """The profile's folder of built artifacts."""
        return self.workspace / "engines" / self.profile.name

    @property
    def vision_folder(self) -> Path:
        """The encoder as ONNX."""
        return self.engines / "vision"

    @property
    def vision_onnx(self) -> Path:
        return self.vision_folder / "vision.onnx"

    @property
    def vision_engine_folder(self) -> Path:
        """What the profile's vision runtime runs, made from the ONNX."""
        return self.engines / "vision-engine"

    @property
    def calibration_result_folder(self) -> Path:
        """What the samples did to the decoder; of no profile, so that one calibration serves every split of the model.

        Its name is made of the choices that a result depends on.
        """
        return self.workspace / "engines" / "calibrations" / sha256_of_json(self.calibration_settings())[:16]

    @property
    def decoder_folder(self) -> Path:
        """The TensorRT-LLM checkpoint."""
        return self.engines / "decoder"

    @property
    def decoder_engine_folder(self) -> Path:
        """One engine per rank, made from the TensorRT-LLM checkpoint."""
        return self.engines / "decoder-engine"

    @property
    def hf_folder(self) -> Path:
        """The whole model as a Hugging Face folder."""
        return self.engines / "hf"

    @property
    def builder_cache(self) -> Path:
        """Kernel times that builders found, for the next build."""
        return self.workspace / "engines" / "builder-cache"

    @property
    def repository(self) -> Path:
        return self.workspace / "triton_repo" / self.profile.name

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint.open(self.checkpoint_folder)

    @cached_property
    def spec(self) -> ModelSpec:
        """Facts of the checkpoint; settings and every tensor's presence and shape are judged here, before a step."""
        spec = spec_from_checkpoint(self.checkpoint)
        require_tensors(self.checkpoint, spec)
        settings = foreign_settings(self.checkpoint, spec)
        settings.require_none_refused()
        settings.warn()
        return spec

    @property
    def tokenizer(self) -> Path:
        path = self.checkpoint_folder / TOKENIZER_NAME
        if not path.is_file():
            raise NvlmError(
                f"no {TOKENIZER_NAME} in {self.checkpoint_folder}", hint="fetch the tokenizer files as well"
            )
        return path

    def layout(self) -> Layout:
        """How the decoder is split. Raises NvlmError naming the legal splits."""
        choice = self.profile.decoder
        return Layout(
            self.spec.decoder,
            QUANT_ALGOS[choice.quantization],
            Parallelism(choice.tensor_parallel, choice.pipeline_parallel),
            KV_CACHE_QUANT_ALGOS[choice.kv_cache],
        )

    @property
    def calibrates_decoder(self) -> bool:
        """False where no scale depends on samples, or where the profile is data-free."""
        return self.profile.decoder.wants_samples and self.profile.calibration.samples > 0

    def calibration_settings(self) -> dict[str, Any]:
        """The profile's choices that decide what reaches the decoder's layers."""
        profile = self.profile
        vision = profile.vision.model_dump(include={"precision", "weight_scales", "fp8_attention"})
        pixels = profile.serving.image_reading.choices()
        return {"vision": vision, "samples": profile.calibration.samples, "wrapper": profile.serving.wrapper, **pixels}

    def prompts(self) -> PromptBuilder:
        """Prompts as the profile's clients will get them."""
        return PromptBuilder(self.tokenizer, self.spec, wrapper=self.profile.serving.wrapper)

    def samples(self) -> list[Sample]:
        """The calibration samples of the profile. Raises NvlmError when there is no list, or none is to be read."""
        return [sample for _, sample in self.placed_samples()]

    def placed_samples(self) -> list[PlacedSample]:
        """As `samples`, each with its line."""
        if self.profile.calibration.samples == 0:
            raise NvlmError(
                f"profile {self.profile.name!r} is data-free (calibration.samples = 0), but its encoder in fp8 needs "
                "pictures",
                hint="give it samples, or choose another vision.precision",
            )
        return read_placed_samples(self._calibration(), limit=self.profile.calibration.samples)

    def checkpoint_inputs(self) -> dict[str, Path]:
        """config.json and every shard, by name."""
        shards = {shard.name: shard for shard in self.checkpoint.shards}
        return {"config.json": self.checkpoint_folder / "config.json", **shards}

    def calibration_inputs(self) -> dict[str, Path]:
        """The list and every picture in it: what else lies in the folder does not matter."""
        folder = self._calibration()
        images = sorted({image for sample in self.samples() for image in sample.images})
        return {f"calibration {os.path.relpath(path, folder)}": path for path in (folder / SAMPLES_NAME, *images)}

    def _calibration(self) -> Path:
        if self.calibration_folder is None:
            raise NvlmError(
                f"profile {self.profile.name!r} quantises to fp8: it needs samples",
                hint="--calibration FOLDER with samples.jsonl and images like those of your users",
            )
        return self.calibration_folder

    def require_lengths(self) -> None:
        """Raises NvlmError when the profile's lengths do not fit the model, or one another."""
        longest, positions = self.profile.decoder.max_seq_len, self.spec.decoder.max_positions
        if longest > positions:
            raise NvlmError(
                f"profile {self.profile.name!r}: max_seq_len {longest}, the model has {positions} positions"
            )
        answer = self.profile.serving.default_max_tokens
        if answer >= longest:
            raise NvlmError(
                f"profile {self.profile.name!r}: default_max_tokens {answer} leaves no room for a prompt "
                f"in max_seq_len {longest}"
            )


def steps_of_build(recipe: Recipe) -> list[str]:
    """The steps of `nvlm build` with this profile: a Hugging Face folder is made only when asked for by its name."""
    left_out = {"export-hf"}
    if recipe.profile.decoder.runtime != TENSORRT_LLM:
        left_out.add("build-llm")
    if not recipe.calibrates_decoder:
        left_out.add("calibrate-llm")
    return [name for name in STEP_NAMES if name not in left_out]
