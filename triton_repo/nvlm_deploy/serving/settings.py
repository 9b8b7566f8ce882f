"""What a model of ours reads of its Triton configuration: string parameters, and files beside its `model.py`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from nvlm_deploy.errors import NvlmError, faults_of
from nvlm_deploy.model.spec import MOST_LAYERS, MOST_TOKENS, ModelSpec

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


def spec_from_json(text: str | bytes) -> ModelSpec:
    """The ModelSpec in JSON text, bytes of UTF-8; NvlmError when it is of another shape."""
    try:
        spec = TypeAdapter(ModelSpec).validate_json(text, strict=True)
    except ValidationError as problem:
        raise NvlmError(f"{SPEC_FILE} is damaged: {faults_of(problem)}", hint="assemble the repository again") from None
    if json.loads(spec_as_json(spec)) != json.loads(text) or not _is_possible(spec):
        raise NvlmError(f"{SPEC_FILE} is damaged: no model is like that", hint="assemble the repository again")
    return spec


def _is_possible(spec: ModelSpec) -> bool:
    """Whether what is derived from its numbers is derived at once, and divides by none that is zero."""
    named = [(name, value) for section in asdict(spec).values() for name, value in section.items()]
    right = all(_is_number_of_a_model(name, value) for name, value in named if not isinstance(value, bool | tuple))
    return (
        right and _is_possible_prompt(spec) and min(spec.vision.head_size, spec.decoder.head_size, spec.vision.grid) > 0
    )


def _is_number_of_a_model(name: str, value: float) -> bool:
    most = MOST_LAYERS if name == "layers" else MOST_TOKENS
    return (value > 0 or (value == 0 and name.endswith("_id"))) and value <= most


def _is_possible_prompt(spec: ModelSpec) -> bool:
    """The end of a turn is among the ends, and every id is one of the vocabulary."""
    prompt = spec.prompt
    in_vocabulary = all(0 <= token < spec.decoder.vocab_size for token in (*prompt.eos_token_ids, prompt.pad_token_id))
    return in_vocabulary and prompt.eos_token_id in prompt.eos_token_ids
