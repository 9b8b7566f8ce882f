"""Do TensorRT-LLM's engines fit the ensemble around them? Their own config.json against every config.pbtxt.

What does not agree would be noticed by the backend at the first long prompt or full batch, or not at all: a prompt
table of another type or vocabulary gives wrong answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvlm_deploy.artifacts import some
from nvlm_deploy.checkpoint.reader import read_json
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.llm.engine_arguments import engine_limits
from nvlm_deploy.llm.engine_config import CONFIG_NAME
from nvlm_deploy.model.spec import ModelSpec
from nvlm_deploy.tensors import PROMPT_EMBEDDING_TABLE
from nvlm_deploy.triton.decoder import DECODER
from nvlm_deploy.triton.pbtxt import ModelConfig

_TRITON_TYPES = {"bfloat16": "TYPE_BF16", "float16": "TYPE_FP16", "float32": "TYPE_FP32"}
_LOGITS = ("context_logits", "generation_logits")
ENGINES = "rank*.engine"
# beyond any server, and any number that a config states
MOST_RANKS, MOST_ANYTHING = 64, 1 << 31


@dataclass(frozen=True)
class EngineFacts:
    """What config.json beside the engines says of them."""

    folder: Path
    version: str
    world_size: int
    dtype: str
    logits_dtype: str
    vocab_size: int
    hidden_size: int
    max_batch_size: int
    max_seq_len: int
    prompt_table_rows: int
    paged_context: bool

    @classmethod
    def read(cls, folder: Path) -> EngineFacts:
        """Raises NvlmError for a config.json that is not one of trtllm-build, naming what it lacks."""
        path = folder / CONFIG_NAME
        document = read_json(path)
        try:
            model, build = document["pretrained_config"], document["build_config"]
            return cls(
                folder,
                str(document["version"]),
                _count(model["mapping"], "world_size", MOST_RANKS),
                str(model["dtype"]),
                str(model["logits_dtype"]),
                _count(model, "vocab_size"),
                _count(model, "hidden_size"),
                _count(build, "max_batch_size"),
                _count(build, "max_seq_len"),
                _count(build, "max_prompt_embedding_table_size"),
                build["plugin_config"]["use_paged_context_fmha"] is True,
            )
        except KeyError as problem:
            raise _not_an_engines(path, f"no {problem}") from None
        except (TypeError, ValueError) as problem:
            raise _not_an_engines(path, str(problem)) from None


def _count(section: Mapping[str, Any], key: str, most: int = MOST_ANYTHING) -> int:
    value = section[key]
    if type(value) is not int or not 0 < value <= most:
        raise ValueError(f"{key} is {str(value)[:40]}, expected a whole number from 1 to {most}")
    return value


def _not_an_engines(path: Path, why: str) -> NvlmError:
    return NvlmError(
        f"{path} is not what trtllm-build writes beside its engines: {why}",
        hint="build the engines again: `nvlm build-llm`",
    )


def require_engines_fit(facts: EngineFacts, configs: Sequence[ModelConfig], spec: ModelSpec) -> None:
    """Raises NvlmError naming everything in which engines and ensemble disagree."""
    by_name = {config.name: config for config in configs}
    faults = [*_missing_ranks(facts), *_differences(facts, by_name, spec)]
    if faults:
        raise NvlmError(
            f"the engines in {facts.folder} are not those of this ensemble:\n  " + "\n  ".join(faults),
            hint="build engines and repository with one profile: `nvlm build`",
        )


def _missing_ranks(facts: EngineFacts) -> Iterator[str]:
    wanted = {f"rank{rank}.engine" for rank in range(facts.world_size)}
    found = {path.name for path in facts.folder.glob(ENGINES)}
    if wanted != found:
        yield f"mapping.world_size {facts.world_size} wants {_names(wanted)}; there is {_names(found)}"


def _names(names: set[str]) -> str:
    return some(sorted(names)) or "none"


def _differences(facts: EngineFacts, configs: Mapping[str, ModelConfig], spec: ModelSpec) -> Iterator[str]:
    decoder, preprocessing = configs[DECODER], configs["preprocessing"]
    table = decoder.tensor(PROMPT_EMBEDDING_TABLE.name)
    length, images = (int(preprocessing.parameter(key) or 0) for key in ("max_seq_len", "max_images"))
    equals: list[tuple[str, Any, str, Any]] = [
        ("max_batch_size", facts.max_batch_size, "tensorrt_llm's max_batch_size", decoder.max_batch_size),
        ("max_seq_len", facts.max_seq_len, "preprocessing's max_seq_len", length),
        ("vocab_size", facts.vocab_size, "the first visual token's id", spec.decoder.vocab_size),
        ("hidden_size", facts.hidden_size, "the prompt table's width", table.dims[-1] if table else None),
        ("dtype", _TRITON_TYPES.get(facts.dtype), "the prompt table's type", table.data_type if table else None),
    ]
    for name in _LOGITS:
        logits = decoder.tensor(name)
        made = _TRITON_TYPES.get(facts.logits_dtype)
        equals.append(("logits_dtype", made, f"{name}'s type", logits.data_type if logits else None))
    for name, engine, what, ensemble in equals:
        if engine != ensemble:
            yield f"{name} is {engine}, {what} is {ensemble}"
    yield from _too_few_rows(facts, spec, length, images)
    if decoder.parameter("enable_chunked_context") == "true" and not facts.paged_context:
        yield "use_paged_context_fmha is off, which prompts in pieces (enable_chunked_context) need"


def _too_few_rows(facts: EngineFacts, spec: ModelSpec, max_seq_len: int, max_images: int) -> Iterator[str]:
    """The runtime grants each request its share of the table (contract C.2)."""
    limits = engine_limits(
        spec.tiling, max_batch_size=facts.max_batch_size, max_seq_len=max_seq_len, max_images=max_images
    )
    granted = facts.prompt_table_rows // facts.max_batch_size
    if granted < limits.visual_tokens:
        yield f"{granted} visual tokens are granted a request, {max_images} image(s) have up to {limits.visual_tokens}"
