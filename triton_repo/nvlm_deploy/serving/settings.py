"""What a model of ours reads of its Triton configuration: string parameters, and files beside its `model.py`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.model.spec import DecoderSpec, ModelSpec, ProjectorSpec, PromptSpec, TilingSpec, VisionSpec

SPEC_FILE = "model_spec.json"
TOKENIZER_FILE = "tokenizer.json"
VISION_FILE = "vision.onnx"
PLAN_FILE = "vision.plan"


class ServingSettings:
    """The parameters of one model and the folder of its version, as Triton hands them to `initialize`."""

    def __init__(self, arguments: Mapping[str, str]) -> None:
        """`arguments` are those of the python backend: model_name, model_repository, model_version, model_config."""
        self.model = arguments["model_name"]
        self.folder = Path(arguments["model_repository"]) / arguments["model_version"]
        parameters = json.loads(arguments["model_config"]).get("parameters", {})
        self._values = {key: value["string_value"] for key, value in parameters.items()}

    def text(self, key: str) -> str:
        """Parameter `key`; NvlmError when config.pbtxt lacks it."""
        if key not in self._values:
            raise NvlmError(f"{self.model}: config.pbtxt has no parameter {key}", hint="assemble the repository again")
        return str(self._values[key])

    def integer(self, key: str) -> int:
        """Parameter `key` as a whole number."""
        text = self.text(key)
        try:
            return int(text)
        except ValueError:
            raise NvlmError(f"{self.model}: parameter {key} is {text!r}, expected a whole number") from None

    def spec(self) -> ModelSpec:
        """The model's facts, written beside `model.py` by the assembler."""
        return spec_from_json((self.folder / SPEC_FILE).read_text(encoding="utf-8"))


def spec_as_json(spec: ModelSpec) -> str:
    """A ModelSpec as JSON text; `spec_from_json` gives the equal spec back."""
    return json.dumps(asdict(spec), indent=2, sort_keys=True) + "\n"


def spec_from_json(text: str) -> ModelSpec:
    """The ModelSpec in JSON text; NvlmError when it is of another shape."""
    try:
        values: dict[str, dict[str, Any]] = json.loads(text)
        return ModelSpec(
            vision=VisionSpec(**values["vision"]),
            projector=ProjectorSpec(**values["projector"]),
            decoder=DecoderSpec(**values["decoder"]),
            tiling=TilingSpec(**values["tiling"]),
            prompt=PromptSpec(**values["prompt"]),
        )
    except (ValueError, TypeError, KeyError) as problem:
        raise NvlmError(f"{SPEC_FILE} is damaged: {problem}", hint="assemble the repository again") from problem
