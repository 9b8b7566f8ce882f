"""The model repository: five folders that Triton can load, and that can be moved or copied as a whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nvlm_deploy.digest import KNOWN_DIGESTS
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.manifest import sha256_of_json
from nvlm_deploy.model.spec import ModelSpec
from nvlm_deploy.places import require_folder
from nvlm_deploy.serving.settings import PLAN_FILE, SPEC_FILE, TOKENIZER_FILE, VISION_FILE, spec_as_json, spec_from_json
from nvlm_deploy.triton.choices import ServingChoices
from nvlm_deploy.triton.decoder import BACKEND, DECODER, VERSION
from nvlm_deploy.triton.engine_fit import ENGINES, EngineFacts, require_engines_fit
from nvlm_deploy.triton.ensemble import ENSEMBLE, POSTPROCESSING, PREPROCESSING, TEXT_DECODER, VISION, ensemble_configs
from nvlm_deploy.triton.pbtxt import ModelConfig, config_from_text, config_text
from nvlm_deploy.triton.wiring import require_wired

CONFIG_NAME = "config.pbtxt"
# the module behind each model.py
_MODULES = {
    PREPROCESSING: "preprocessing",
    VISION: "vision_encoder",
    DECODER: "decoder",
    TEXT_DECODER: "text_decoder",
    POSTPROCESSING: "postprocessing",
}


@dataclass(frozen=True)
class RepositorySources:
    """What a repository is made of; `decoder` holds TensorRT-LLM's engines, or a checkpoint for the reference decoder.

    A checkpoint's files are read by rank, engines also have the logs of their build beside them.
    """

    vision: Path
    decoder: Path
    tokenizer: Path
    spec: ModelSpec

    @property
    def vision_files(self) -> list[Path]:
        """The engine: a graph with its data, or a plan."""
        return sorted([*self.vision.glob(f"{VISION_FILE}*"), *self.vision.glob(PLAN_FILE)])

    @property
    def decoder_files(self) -> list[Path]:
        """config.json, and what each rank loads."""
        ranks = [*self.decoder.glob(ENGINES)] or [*self.decoder.glob("rank*")]
        return [self.decoder / "config.json", *sorted(ranks)]

    def checked(self) -> RepositorySources:
        """Itself. Raises NvlmError naming the first part that is missing."""
        if not self.vision_files:
            raise NvlmError(f"{self.vision} has no {VISION_FILE} or {PLAN_FILE}", hint="build it first: `nvlm build`")
        for part, pattern in ((self.decoder, "config.json"), (self.decoder, "rank*")):
            if not any(part.glob(pattern)):
                raise NvlmError(f"{part} has no {pattern}", hint="build it first: `nvlm build`")
        if not self.tokenizer.is_file():
            raise NvlmError(f"no tokenizer.json at {self.tokenizer}", hint="fetch the tokenizer of the checkpoint")
        return self


def write_repository(folder: Path, sources: RepositorySources, choices: ServingChoices) -> None:
    """Fill an empty folder with the repository, then read it back and cross-check it.

    Engines and weights are hard links where the file system allows; a graph with external data is a copy, for the onnx
    tools refuse such data with several links. Configs hold no path but within the folder, so it can be moved. Writing
    is not atomic: fill a temporary folder and rename it (`artifacts.replace_folder`, or a pipeline step).
    """
    sources.checked()
    sums = KNOWN_DIGESTS.of(sources.vision_files)
    digest = sha256_of_json([sums[file] for file in sources.vision_files])
    for config in ensemble_configs(sources.spec, choices, vision_digest=digest):
        _write_model(folder / config.name, config)
    spec_file = folder / PREPROCESSING / VERSION / SPEC_FILE
    spec_file.write_text(spec_as_json(sources.spec), encoding="utf-8")
    for name in (PREPROCESSING, DECODER if choices.engines is None else TEXT_DECODER):
        shutil.copyfile(sources.tokenizer, folder / name / VERSION / TOKENIZER_FILE)
    for file in sources.vision_files:
        place = link_or_copy if file.name == PLAN_FILE else shutil.copyfile
        place(file, folder / VISION / VERSION / file.name)
    for file in sources.decoder_files:
        link_or_copy(file, folder / DECODER / VERSION / file.name)
    read_repository(folder)


def _write_model(folder: Path, config: ModelConfig) -> None:
    (folder / VERSION).mkdir(parents=True)
    (folder / CONFIG_NAME).write_text(config_text(config), encoding="utf-8")
    if config.backend == "python":
        line = f"from nvlm_deploy.serving.{_MODULES[config.name]} import TritonPythonModel  # noqa: F401\n"
        (folder / VERSION / "model.py").write_text(line, encoding="utf-8")


def read_repository(folder: Path) -> tuple[ModelConfig, ...]:
    """The configs of a repository, cross-checked. Raises NvlmError when it is none, or wired wrong."""
    require_folder(folder)
    files = sorted(folder.glob(f"*/{CONFIG_NAME}"))
    configs = tuple(config_from_text(_text_of(file), origin=str(file)) for file in files)
    if ENSEMBLE not in {config.name for config in configs}:
        raise NvlmError(f"{folder} has no model {ENSEMBLE}: not a repository of ours", hint="`nvlm build` makes one")
    for file, config in zip(files, configs, strict=True):
        if file.parent.name != config.name:
            raise NvlmError(f"{file} configures a model called {config.name}; folder and name must be the same")
    require_wired(configs)
    facts = engine_facts(folder, configs)
    if facts is not None:
        spec_file = folder / PREPROCESSING / VERSION / SPEC_FILE
        require_engines_fit(facts, configs, spec_from_json(_text_of(spec_file)))
    return configs


def engine_facts(folder: Path, configs: Sequence[ModelConfig]) -> EngineFacts | None:
    """What TensorRT-LLM's engines in a repository say of themselves; None where the reference decoder is."""
    if BACKEND not in {config.backend for config in configs}:
        return None
    return EngineFacts.read(folder / DECODER / VERSION)


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as problem:
        raise NvlmError(f"{file} is no UTF-8 text: {problem.reason} at {problem.start}") from None


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link, or a copy on another file system."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copy2(source, target)
