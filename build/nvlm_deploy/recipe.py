"""The steps from a checkpoint to an assembled Triton repository, for one profile."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvlm_deploy.artifacts import MANIFEST_NAME, read_manifest, sha256_of_json
from nvlm_deploy.checkpoint.reader import Checkpoint
from nvlm_deploy.checkpoint.trtllm_layout import FP8, Layout, Parallelism
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.model.inventory import require_tensors
from nvlm_deploy.model.prompt import PromptBuilder
from nvlm_deploy.model.spec import ModelSpec, spec_from_checkpoint
from nvlm_deploy.pipeline import Pipeline, State, Step
from nvlm_deploy.profile import Profile
from nvlm_deploy.sample_embeddings import SampleEmbedder
from nvlm_deploy.samples import SAMPLES_NAME, Sample, read_samples

if TYPE_CHECKING:
    from nvlm_deploy.llm.calibrate import CalibrationResult
    from nvlm_deploy.triton.ensemble import ServingChoices

TOKENIZER_NAME = "tokenizer.json"
KV_CACHE_DTYPES = {"16bit": "bfloat16"}
STEP_NAMES = ("export-vision", "quantize-llm", "assemble")


@dataclass(frozen=True)
class Recipe:
    """One checkpoint, one profile, and where everything made from them lies."""

    checkpoint_folder: Path
    profile: Profile
    workspace: Path
    calibration_folder: Path | None = None

    @property
    def vision_folder(self) -> Path:
        return self.workspace / "engines" / self.profile.name / "vision"

    @property
    def decoder_folder(self) -> Path:
        return self.workspace / "engines" / self.profile.name / "decoder"

    @property
    def repository(self) -> Path:
        return self.workspace / "triton_repo" / self.profile.name

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint.open(self.checkpoint_folder)

    @cached_property
    def spec(self) -> ModelSpec:
        """Facts of the checkpoint; every tensor's presence and shape is judged here, before a step starts."""
        spec = spec_from_checkpoint(self.checkpoint)
        require_tensors(self.checkpoint, spec)
        return spec

    @property
    def tokenizer(self) -> Path:
        path = self.checkpoint_folder / TOKENIZER_NAME
        if not path.is_file():
            raise NvlmError(
                f"no {TOKENIZER_NAME} in {self.checkpoint_folder}", hint="fetch the tokenizer files as well"
            )
        return path

    def pipeline(self, only: str | None = None) -> Pipeline:
        """The steps in order, or one. Raises NvlmError when what they read is not usable."""
        makers: Mapping[str, Callable[[], Step]] = {
            "export-vision": self._export_vision,
            "quantize-llm": self._quantize_llm,
            "assemble": self._assemble,
        }
        chosen = {name: make for name, make in makers.items() if only in (None, name)}
        self._require_inputs(chosen)
        return Pipeline(self.workspace / "engines" / self.profile.name / ".lock", chosen)

    def run(self, *, force: bool = False) -> Iterator[tuple[Step, State]]:
        """All steps; see Pipeline.run."""
        return self.pipeline().run(force=force)

    def _layout(self) -> Layout:
        """How the decoder is split. Raises NvlmError naming the legal splits."""
        choice = self.profile.decoder
        quant_algo = None if choice.quantization == "none" else FP8
        return Layout(self.spec.decoder, quant_algo, Parallelism(choice.tensor_parallel, choice.pipeline_parallel))

    def _require_lengths(self) -> None:
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

    def _prompts(self) -> PromptBuilder:
        return PromptBuilder(self.tokenizer, self.spec, wrapper=self.profile.serving.wrapper)

    def _require_inputs(self, steps: Collection[str]) -> None:
        """What would fail hours later must fail now."""
        self._prompts().require_matches(self.spec)
        self._require_lengths()
        if "quantize-llm" in steps:
            self._layout()
        if self.profile.decoder.quantization != "none" and "quantize-llm" in steps:
            self._samples()

    def _checkpoint_inputs(self) -> dict[str, Path]:
        shards = {shard.name: shard for shard in self.checkpoint.shards}
        return {"config.json": self.checkpoint_folder / "config.json", **shards}

    def _export_vision(self) -> Step:
        precision = self.profile.vision.precision

        def make(folder: Path) -> Mapping[str, Any]:
            from nvlm_deploy.vision.export import onnx_from_checkpoint

            onnx_from_checkpoint(self.checkpoint, self.spec, folder, precision=precision)
            return {}

        tools = ("torch", "onnx", "onnxruntime")
        return Step(
            "export-vision", self.vision_folder, self._checkpoint_inputs(), {"precision": precision}, make, tools
        )

    def _quantize_llm(self) -> Step:
        choice = self.profile.decoder
        inputs = self._checkpoint_inputs()
        settings = choice.model_dump(include={"quantization", "kv_cache", "tensor_parallel", "pipeline_parallel"})
        if choice.quantization != "none":
            inputs |= {"vision": self.vision_folder, **self._calibration_inputs()}
            settings |= {"calibration samples": len(self._samples()), "wrapper": self.profile.serving.wrapper}

        def make(folder: Path) -> Mapping[str, Any]:
            from nvlm_deploy.llm.trtllm import trtllm_checkpoint_from

            trtllm_checkpoint_from(
                self.checkpoint,
                self.spec,
                folder,
                calibration=None if choice.quantization == "none" else self._calibrated(),
                parallelism=self._layout().parallelism,
            )
            return {}

        return Step("quantize-llm", self.decoder_folder, inputs, settings, make, ("torch", "safetensors"))

    def _assemble(self) -> Step:
        inputs = {"vision": self.vision_folder, "decoder": self.decoder_folder, TOKENIZER_NAME: self.tokenizer}
        self._require_one_checkpoint()

        def make(folder: Path) -> Mapping[str, Any]:
            from nvlm_deploy.triton.repository import RepositorySources, write_repository

            sources = RepositorySources(self.vision_folder, self.decoder_folder, self.tokenizer, self.spec)
            write_repository(folder, sources, self._serving_choices())
            return {}

        return Step("assemble", self.repository, inputs, self._assembly_settings(), make, ("tritonclient",))

    def _require_one_checkpoint(self) -> None:
        """Steps run one by one could join one model's encoder to another's decoder."""
        folders = (self.vision_folder, self.decoder_folder)
        if not all((folder / MANIFEST_NAME).is_file() for folder in folders):
            return
        vision, decoder = (read_manifest(folder).inputs for folder in folders)
        for name in self._checkpoint_inputs():
            if vision.get(name) != decoder.get(name):
                raise NvlmError(
                    f"{self.vision_folder} and {self.decoder_folder} were made from different checkpoints: "
                    f"{name} differs",
                    hint="`nvlm build` makes both from one",
                )

    def _assembly_settings(self) -> dict[str, Any]:
        """Assembling is cheap, so whatever its code would write differently counts as another choice."""
        from nvlm_deploy.triton.ensemble import ensemble_configs
        from nvlm_deploy.triton.pbtxt import config_text

        configs = ensemble_configs(self.spec, self._serving_choices(), vision_digest="any")
        texts = {config.name: config_text(config) for config in configs}
        return {"profile": self.profile.name, "spec": dataclasses.asdict(self.spec), "configs": sha256_of_json(texts)}

    def _serving_choices(self) -> ServingChoices:
        from nvlm_deploy.triton.ensemble import ServingChoices

        decoder, serving = self.profile.decoder, self.profile.serving
        return ServingChoices(
            max_batch_size=decoder.max_batch_size,
            max_seq_len=decoder.max_seq_len,
            max_images=serving.max_images,
            default_max_tokens=serving.default_max_tokens,
            prompt_wrapper=serving.wrapper,
            kv_cache_dtype=KV_CACHE_DTYPES[decoder.kv_cache],
        )

    def _calibration(self) -> Path:
        if self.calibration_folder is None:
            raise NvlmError(
                f"profile {self.profile.name!r} quantises to {self.profile.decoder.quantization}: it needs samples",
                hint="--calibration FOLDER with samples.jsonl and images like those of your users",
            )
        return self.calibration_folder

    def _calibration_inputs(self) -> dict[str, Path]:
        """The list and every picture in it: what else lies in the folder does not matter."""
        folder = self._calibration()
        images = sorted({image for sample in self._samples() for image in sample.images})
        return {f"calibration {os.path.relpath(path, folder)}": path for path in (folder / SAMPLES_NAME, *images)}

    def _samples(self) -> list[Sample]:
        return read_samples(self._calibration(), limit=self.profile.calibration.samples)

    def _calibrated(self) -> CalibrationResult:
        """amax values of the decoder's linears over the samples, images through the exported vision encoder."""
        from nvlm_deploy.llm.calibrate import calibrate
        from nvlm_deploy.vision.engine import OnnxRuntimeEngine

        embedder = SampleEmbedder(
            self._prompts(),
            self.spec.tiling,
            OnnxRuntimeEngine(self.vision_folder / "vision.onnx"),
            self.checkpoint.tensor("language_model.model.embed_tokens.weight").float(),
        )
        embeddings = [embedder.prompt_and_answer(sample) for sample in self._samples()]
        return calibrate(self.checkpoint, self.spec, embeddings)
