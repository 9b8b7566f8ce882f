"""The model repository: five folders that Triton can load, and that can be moved or copied as a whole."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from nvlm_deploy.artifacts import sha256_of, sha256_of_json
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.model.spec import ModelSpec
from nvlm_deploy.serving.settings import PLAN_FILE, SPEC_FILE, TOKENIZER_FILE, VISION_FILE, spec_as_json
from nvlm_deploy.triton.ensemble import (
    DECODER,
    ENSEMBLE,
    POSTPROCESSING,
    PREPROCESSING,
    PYTHON_MODELS,
    VISION,
    ServingChoices,
    ensemble_configs,
)
from nvlm_deploy.triton.pbtxt import ModelConfig, config_from_text, config_text
from nvlm_deploy.triton.wiring import require_wired

CONFIG_NAME = "config.pbtxt"
VERSION = "1"
# the module behind each model.py; the reference decoder stands where TensorRT-LLM would
_MODULES = {
    PREPROCESSING: "preprocessing",
    VISION: "vision_encoder",
    DECODER: "decoder",
    POSTPROCESSING: "postprocessing",
}


@dataclass(frozen=True)
class RepositorySources:
    """What a repository is made of."""

    vision: Path
    decoder: Path
    tokenizer: Path
    spec: ModelSpec

    @property
    def vision_files(self) -> list[Path]:
        """The engine: a graph with its data, or a plan."""
        return sorted([*self.vision.glob(f"{VISION_FILE}*"), *self.vision.glob(PLAN_FILE)])

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

    The decoder's files are hard links where the file system allows, the rest copies: the onnx tools refuse external
    data with several links. Configs hold no path, so the folder can be moved. Writing is not atomic: fill a temporary
    folder and rename it (`artifacts.replace_folder`, or a pipeline step).
    """
    sources.checked()
    vision_files = sources.vision_files
    digest = sha256_of_json([sha256_of(file) for file in vision_files])
    for config in ensemble_configs(sources.spec, choices, vision_digest=digest):
        version = folder / config.name / VERSION
        version.mkdir(parents=True)
        (folder / config.name / CONFIG_NAME).write_text(config_text(config), encoding="utf-8")
    for name in PYTHON_MODELS:
        line = f"from nvlm_deploy.serving.{_MODULES[name]} import TritonPythonModel  # noqa: F401\n"
        (folder / name / VERSION / "model.py").write_text(line, encoding="utf-8")
    spec_file = folder / PREPROCESSING / VERSION / SPEC_FILE
    spec_file.write_text(spec_as_json(sources.spec), encoding="utf-8")
    for name in (PREPROCESSING, POSTPROCESSING):
        shutil.copyfile(sources.tokenizer, folder / name / VERSION / TOKENIZER_FILE)
    for file in vision_files:
        shutil.copyfile(file, folder / VISION / VERSION / file.name)
    for file in (sources.decoder / "config.json", *sources.decoder.glob("rank*")):
        link_or_copy(file, folder / DECODER / VERSION / file.name)
    read_repository(folder)


def read_repository(folder: Path) -> tuple[ModelConfig, ...]:
    """The configs of a repository, cross-checked. Raises NvlmError when it is none, or wired wrong."""
    files = sorted(folder.glob(f"*/{CONFIG_NAME}"))
    configs = tuple(config_from_text(file.read_text(encoding="utf-8"), origin=str(file)) for file in files)
    if ENSEMBLE not in {config.name for config in configs}:
        raise NvlmError(f"{folder} has no model {ENSEMBLE}: not a repository of ours", hint="`nvlm build` makes one")
    for file, config in zip(files, configs, strict=True):
        if file.parent.name != config.name:
            raise NvlmError(f"{file} configures a model called {config.name}; folder and name must be the same")
    require_wired(configs)
    return configs


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link, or a copy on another file system."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copy2(source, target)
