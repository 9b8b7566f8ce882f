"""The program of the preflight's child process: `python -P preflight_probe.py request.json answer.json`.

It reads, and judges nothing: versions, the functions that build one rank, what TensorRT-LLM makes of each config.json,
and the tensors it wants for each rank. Runs with the container's Python: only the standard library and what is probed.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

MODULES = ("tensorrt_llm", "tensorrt", "tritonserver")
BUILD_MODULE = "tensorrt_llm.commands.build"
FUNCTIONS = ("parallel_build", "build_and_save")


def main(request_file: str, answer_file: str) -> None:
    """`request`: name -> {"config": config.json, "ranks": number of ranks}."""
    with open(request_file, encoding="utf-8") as file:  # noqa: PTH123
        request: dict[str, dict[str, Any]] = json.load(file)
    answer = {
        "modules": {name: attempt(version_of, name) for name in MODULES},
        "functions": {name: attempt(parameters_of, name) for name in FUNCTIONS},
        "configs": {name: attempt(round_trip, wish["config"]) for name, wish in request.items()},
        "ranks": {
            name: [attempt(tensors_of, wish["config"], rank) for rank in range(wish["ranks"])]
            for name, wish in request.items()
        },
    }
    with open(answer_file, "w", encoding="utf-8") as file:  # noqa: PTH123
        json.dump(answer, file, default=str)


def attempt(look: Callable[..., Any], *of: Any) -> Mapping[str, Any]:
    """{"value": ...}, or {"error": its class and first line}: one thing that fails does not hide the others."""
    try:
        return {"value": look(*of)}
    except Exception as problem:  # whatever a foreign library raises is the finding
        lines = str(problem).splitlines() or [""]
        return {"error": f"{type(problem).__name__}: {lines[0]}"}


def version_of(module: str) -> str:
    return str(getattr(importlib.import_module(module), "__version__", "of no stated version"))


def parameters_of(function: str) -> list[str]:
    return list(inspect.signature(getattr(importlib.import_module(BUILD_MODULE), function)).parameters)


def config_of(config: Mapping[str, Any]) -> Any:
    utilities: Any = importlib.import_module("tensorrt_llm.models.modeling_utils")
    return utilities.PretrainedConfig.from_dict(copy.deepcopy(config))


def round_trip(config: Mapping[str, Any]) -> Any:
    """As an engine's config.json will say it."""
    return json.loads(json.dumps(config_of(config).to_dict(), default=str))


def tensors_of(config: Mapping[str, Any], rank: int) -> dict[str, list[Any]]:
    """Name -> [type, shape] of what `PretrainedModel.load` will demand: parameters that are not computed."""
    models: Any = importlib.import_module("tensorrt_llm.models")
    parsed = config_of(config)
    parsed.set_rank(rank)
    network = models.MODEL_MAP[parsed.architecture](parsed)
    return {
        name: [str(parameter.dtype).rpartition(".")[2], [int(size) for size in parameter.shape]]
        for name, parameter in network.named_parameters()
        if not parameter.is_inited()
    }


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
